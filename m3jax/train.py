"""Trains a language model: python -m m3jax.train --config configs/tiny_mimo.py [--config.train.steps=100 ...].

Run the same command again to continue an interrupted run: its workdir holds everything. See docs/training.md.
"""

from collections.abc import Sequence
from pathlib import Path

import jax

from m3jax.cli import Parser, read_config, run_main
from m3jax.errors import ConfigError
from m3jax.training.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and trains.

    Args:
      argv: the arguments; None = those of this process.
    """
    parser = Parser("m3jax.train", "Trains a language model, or continues the run in the workdir.")
    parser.add_argument("--config", required=True, metavar="FILE", help="a config file, as in configs/")
    parser.add_argument("--workdir", metavar="DIR", help="where the run is kept (default: runs/NAME_OF_CONFIG_FILE)")
    parser.add_argument(
        "--distributed",
        nargs="*",
        metavar=("COORDINATOR", "COUNT INDEX"),
        help="join the other processes of this run: found by themselves under SLURM, Open MPI or Kubernetes, elsewhere "
        "HOST:PORT of the first one, how many there are, and which this is",
    )
    arguments, overrides = parser.parse(argv)
    config = read_config(arguments.config, overrides)
    if arguments.distributed is not None:
        _join(arguments.distributed)
    train(config, arguments.workdir or Path("runs") / Path(arguments.config).stem)


def _join(place: list[str]) -> None:
    if place and not (len(place) == 3 and place[1].isdecimal() and place[2].isdecimal()):
        raise ConfigError(f"--distributed {' '.join(place)}: expected nothing, or HOST:PORT COUNT INDEX.")
    jax.distributed.initialize(*place[:1], *map(int, place[1:]))


if __name__ == "__main__":
    run_main(main)
