"""Copies a checkpoint into the other layout: `python -m m3jax.convert --from DIR --to DIR [--format mamba_ssm]`."""

from collections.abc import Sequence
from pathlib import Path

from m3jax.cli import Parser, run_main
from m3jax.errors import CheckpointError
from m3jax.interop import mamba_ssm
from m3jax.loading import read_checkpoint
from m3jax.training.checkpoint import save_parameters


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with these arguments (None = those of the process).

    The model's config keys that are given with --config.model.KEY=VALUE hold for the copy.
    """
    parser = Parser("m3jax.convert", "Copies a checkpoint into the released layout, or a released one into ours.")
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="DIR", help="a workdir, a checkpoint in it, or a released one")
    add("--to", dest="target", required=True, metavar="DIR", help="to be made")
    add("--format", choices=("m3jax", "mamba_ssm"), help="of the copy (default: the one that the source is not in)")
    add("--step", type=int, help="of a workdir, which checkpoint (default: the newest)")
    add("--ema", action="store_true", help="take the moving average of the parameters")
    arguments, overrides = parser.parse(argv)
    target = Path(arguments.target)
    if target.exists():
        raise CheckpointError(f"{target} exists already, and nothing is ever overwritten: choose another --to.")
    checkpoint = read_checkpoint(arguments.source, arguments.step, ema=arguments.ema, overrides=overrides)
    released = mamba_ssm.is_released_checkpoint(checkpoint.path)
    layout = arguments.format or ("m3jax" if released else "mamba_ssm")
    if layout == "m3jax":
        save_parameters(target, checkpoint)
    else:
        mamba_ssm.write(target, checkpoint.config.model, checkpoint.params, checkpoint.tokenizer.json_text)
    print(f"{checkpoint.path} is now in {target}, format {layout}")
    activation = checkpoint.config.model.a_activation
    if layout == "mamba_ssm" and activation != "heavy_tail" and "mamba3" in checkpoint.config.model.mixer_pattern:
        print(f"its A is {activation}: the released code of March 2026 computes it so, that since June heavy_tail")


if __name__ == "__main__":
    run_main(main)
