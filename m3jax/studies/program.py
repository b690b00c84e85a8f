"""The program of a study: python experiments/STUDY/sweep.py --config PRESET [--workdir DIR] [...]."""

import sys
from collections.abc import Sequence
from pathlib import Path

from m3jax.cli import Parser, read_config
from m3jax.studies.config import StudyConfig, build_study
from m3jax.studies.grid import make_groups
from m3jax.studies.report import write_report
from m3jax.studies.sweep import run_sweep


def run_study(program: Path, argv: Sequence[str] | None = None) -> None:
    """Reads the command line, trains, measures and reports.

    Args:
      program: the file that is run, experiments/STUDY/sweep.py; presets are in configs/ beside it.
      argv: the arguments; None = those of this process.
    """
    presets = program.parent / "configs"
    name = f"experiments/{program.parent.name}/{program.name}"
    parser = Parser(name, "Trains and measures a study.", StudyConfig)
    known = ", ".join(sorted(path.stem for path in presets.glob("*.py")))
    parser.add_argument("--config", required=True, metavar="PRESET", help=f"{known}, or a file like theirs")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where it is kept (default: runs/PRESET)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these of the study's tasks")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="only these of its models")
    parser.add_argument("--commit", help="what is measured, for the record")
    arguments, overrides = parser.parse(argv)
    preset = preset_path(arguments.config, presets)
    study = read_config(preset, overrides, build_study)
    groups = make_groups(study, arguments.tasks, arguments.models)
    workdir = arguments.workdir or Path("runs") / preset.stem
    if run_sweep(study, workdir, groups):
        command = " ".join(["python", name, *(sys.argv[1:] if argv is None else argv)])
        for path in write_report(workdir, study, command, arguments.commit):
            print(path)


def preset_path(text: str, presets: Path) -> Path:
    """The file of a preset's name, or the file that is named."""
    return Path(text) if text.endswith(".py") else presets / f"{text}.py"
