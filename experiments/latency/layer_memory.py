"""Memory of the scan's and of one layer's gradient at the 1.5B sizes, by XLA's own analysis of the compiled programs.

python experiments/latency/layer_memory.py [--batch-size 8] [--lengths 2048 4096]

Nothing is run, so it works on a small machine (where operands are float32). What the gradient keeps of the sequence is
what grows with its length; beside it stands what rotated B and C of every head alone would take, once each.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from m3jax.cli import read_config
from m3jax.config import ModelConfig
from m3jax.kernels import mamba3_scan
from m3jax.models.block import Block


def layer_bytes(config: ModelConfig, batch: int, length: int) -> int:
    """Temporaries of the gradient of one layer with respect to its input and parameters."""
    block = Block(config, "mamba3")
    x = jax.ShapeDtypeStruct((batch, length, config.d_model), jnp.float32)
    params = jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.zeros((1, 2, config.d_model)), None, None))
    return _temporaries(lambda p, x: jnp.sum(block.apply(p, x, None, None)[0]), params, x)


def scan_bytes(config: ModelConfig, batch: int, length: int) -> int:
    """Temporaries of the gradient of the scan with respect to what the projections give it."""
    lead, bc = (batch, length), (config.mimo_rank, config.ngroups, config.d_state)
    shapes = {name: (*lead, config.n_heads, config.headdim) for name in ("x", "z")}
    shapes |= {name: (*lead, *bc) for name in ("b", "c")} | {"omega": (*lead, config.n_angles)}
    shapes |= {name: (*lead, config.n_heads) for name in ("dt", "a", "lam")}
    narrow = ("x", "z", "b", "c")
    args = {
        name: jax.ShapeDtypeStruct(shape, config.dtype if name in narrow else "float32")
        for name, shape in shapes.items()
    }
    return _temporaries(lambda args: jnp.sum(mamba3_scan(**args, implementation="xla").astype("float32")), args)


def _temporaries(function, *args) -> int:
    gradient = jax.jit(jax.grad(function, argnums=tuple(range(len(args)))))
    return gradient.lower(*args).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints a line for each rank and length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    options = parser.parse_args()
    print(f"{'GB':<20}{'layer':>8}{'scan':>8}{'rotated B and C of all heads':>32}")
    for name in ("1b_siso", "1b_mimo"):
        config = dataclasses.replace(read_config(f"configs/{name}.py").model, n_layers=1)
        for length in options.lengths:
            measured = [f(config, options.batch_size, length) / 1e9 for f in (layer_bytes, scan_bytes)]
            elements = 2 * options.batch_size * length * config.n_heads * config.mimo_rank * config.d_state
            print(f"{name} {length:<12}{measured[0]:>8.2f}{measured[1]:>8.2f}{4 * elements / 1e9:>32.2f}", flush=True)


if __name__ == "__main__":
    main()
