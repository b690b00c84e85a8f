"""Sets a model's held-out bits per byte beside the baselines' on the same text.

python experiments/bits_per_byte/report.py --evaluation FILE --baselines FILE

The files are what `python -m m3jax.evaluate --json` and `baselines.py --json` wrote.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from m3jax.cli import run_main
from m3jax.errors import DataError

_NAMES = {
    "xz_alone": "xz -9e, the held-out part alone",
    "xz_given_train": "xz -9e, given the training part",
    "ngram_order_5": "5-byte context, Kneser-Ney",
}


def table(evaluation: dict, baselines: dict) -> str:
    """Returns the lines, best first.

    Raises:
      DataError: the two were not measured on the same text.
    """
    if evaluation["bytes"] != baselines["held_out_bytes"]:
        raise DataError(
            f"The model was measured on {evaluation['bytes']:,} bytes, the baselines on "
            f"{baselines['held_out_bytes']:,}: evaluate all held-out data of the same source."
        )
    rows = {name: baselines[key] for key, name in _NAMES.items()}
    rows[f"this model, step {evaluation['step']}"] = evaluation["bits_per_byte"]
    ranked = sorted(rows.items(), key=lambda row: row[1])
    return "\n".join(f"  {name:<36}{value:.4f}" for name, value in ranked)


def read(path: Path, keys: Sequence[str], program: str) -> dict:
    """Reads what a program wrote.

    Raises:
      DataError: the file lacks one of the keys.
    """
    try:
        values = json.loads(path.read_text())
        return {key: values[key] for key in keys}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: expected what {program} --json wrote.") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Reads both files and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--baselines", type=Path, required=True)
    options = parser.parse_args(argv)
    evaluation = read(options.evaluation, ("bytes", "step", "bits_per_byte"), "python -m m3jax.evaluate")
    print(table(evaluation, read(options.baselines, ("held_out_bytes", *_NAMES), "baselines.py")))


if __name__ == "__main__":
    run_main(main)
