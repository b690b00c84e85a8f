"""Trains and measures a study: python experiments/state_tracking/sweep.py --config parity_quick [--workdir DIR] [...].

Run the same command again to continue an interrupted study. See docs/state_tracking.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from m3jax.cli import Parser, read_config, run_main
from m3jax.studies.config import StudyConfig, build_study
from m3jax.studies.grid import make_groups
from m3jax.studies.report import write_report
from m3jax.studies.sweep import run_sweep
from m3jax.training.workdir import locked

_PRESETS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, trains, measures and reports.

    Args:
      argv: the arguments; None = those of this process.
    """
    parser = Parser("experiments/state_tracking/sweep.py", "Trains and measures a study.", StudyConfig)
    presets = ", ".join(sorted(path.stem for path in _PRESETS.glob("*.py")))
    parser.add_argument("--config", required=True, metavar="PRESET", help=f"{presets}, or a file like theirs")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where it is kept (default: runs/PRESET)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these of the study's tasks")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="only these of its models")
    parser.add_argument("--commit", help="what is measured, for the record")
    arguments, overrides = parser.parse(argv)
    preset = Path(arguments.config)
    if preset.suffix != ".py":
        preset = _PRESETS / f"{preset}.py"
    study = read_config(preset, overrides, build_study)
    groups = make_groups(study, arguments.tasks, arguments.models)
    workdir = arguments.workdir or Path("runs") / preset.stem
    with locked(workdir):
        if run_sweep(study, workdir, groups):
            command = " ".join(
                ["python experiments/state_tracking/sweep.py", *(sys.argv[1:] if argv is None else argv)]
            )
            for path in write_report(workdir, study, command, arguments.commit):
                print(path)


if __name__ == "__main__":
    run_main(main)
