"""Sets a model's held-out bits per byte beside the baselines' on the same text.

python experiments/bits_per_byte/report.py --evaluation FILE --baselines FILE

The files are what `python -m m3jax.evaluate --json` and `baselines.py --json` wrote.
"""

import argparse
import json
from pathlib import Path

_NAMES = {
    "xz_alone": "xz -9e, the held-out part alone",
    "xz_given_train": "xz -9e, given the training part",
    "ngram_order_5": "5-byte context, Kneser-Ney",
}


def table(evaluation: dict, baselines: dict) -> str:
    """Returns the lines, best first.

    Raises:
      ValueError: the two were not measured on the same text.
    """
    if evaluation["bytes"] != baselines["held_out_bytes"]:
        raise ValueError(
            f"The model was measured on {evaluation['bytes']:,} bytes, the baselines on "
            f"{baselines['held_out_bytes']:,}: evaluate all held-out data of the same source."
        )
    rows = {name: baselines[key] for key, name in _NAMES.items()}
    rows[f"this model, step {evaluation['step']}"] = evaluation["bits_per_byte"]
    ranked = sorted(rows.items(), key=lambda row: row[1])
    return "\n".join(f"  {name:<36}{value:.4f}" for name, value in ranked)


def main() -> None:
    """Reads both files and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--baselines", type=Path, required=True)
    options = parser.parse_args()
    print(table(json.loads(options.evaluation.read_text()), json.loads(options.baselines.read_text())))


if __name__ == "__main__":
    main()
