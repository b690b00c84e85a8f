"""`python -m m3jax.data.prepare`: turns text into token shards, which config.data.source = "tokens:DIR" reads."""

from collections.abc import Sequence
from pathlib import Path

from m3jax.cli import Parser, run_main
from m3jax.config import DataConfig, build_config, override
from m3jax.data.corpus import open_text_source
from m3jax.data.shards import META_FILE, read_meta
from m3jax.data.tokenise import tokenise
from m3jax.data.tokenizer import load_tokenizer
from m3jax.errors import DataError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
      argv: the arguments after the program's name; None = those of this process.

    Raises:
      ConfigError: a wrong argument.
      DataError: a source, tokenizer or target that cannot be used.
    """
    parser = Parser("m3jax.data.prepare", "Turns text into token shards.")
    parser.add_argument("--source", default=DataConfig.source, help="kjv, hf:NAME or a glob; default %(default)s")
    parser.add_argument("--tokenizer", default=DataConfig.tokenizer, help="bytes, a tokenizer.json or a hub name")
    parser.add_argument("--holdout", type=float, default=DataConfig.holdout, help="share; default %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    arguments, overrides = parser.parse(argv)
    flags = {f"data.{name}": getattr(arguments, name) for name in ("source", "tokenizer", "holdout")}
    data = build_config(override({}, flags | overrides)).data
    out = arguments.out.expanduser()
    if out.exists():
        raise DataError(f"--out {out}: is already there and will not be overwritten.")
    tokenise(open_text_source(data.source, data), load_tokenizer(data.tokenizer), data.holdout, out)
    for path in sorted(out.rglob(META_FILE)):
        meta = read_meta(path.parent)
        tokens = sum(shard["tokens"] for shard in meta.shards)
        print(
            f"{path.parent}: {tokens:,} tokens ({meta.dtype}), {meta.documents:,} documents, {meta.text_bytes:,} bytes"
        )
    print(f"Train on it with --config.data.source=tokens:{out} --config.data.tokenizer={data.tokenizer}")


if __name__ == "__main__":
    run_main(main)
