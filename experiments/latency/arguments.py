"""The command line of programs that time kernels."""

import argparse

from m3jax.kernels.gpu import no_triton_here


def parse_on_gpu(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The process's arguments; ends it with a line that says so where no kernel can run."""
    options = parser.parse_args()
    if reason := no_triton_here():
        parser.error(f"{reason}; the kernels need an NVIDIA GPU")
    return options
