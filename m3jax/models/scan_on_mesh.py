"""The Mamba-3 scan of a layer, by all devices where a mesh is set: they share the batch, and may share sequences."""

import jax

from m3jax.config import ModelConfig
from m3jax.kernels import Mamba3State, mamba3_scan
from m3jax.models.own_rows import on_own_pieces, on_own_rows


def scan_on_mesh(
    config: ModelConfig,
    seq: dict[str, jax.Array | None],
    weights: dict[str, jax.Array],
    state: Mamba3State | None,
    **options: float,
) -> tuple[jax.Array, Mamba3State | None]:
    """y and the next state, stored as the config says; without a state before the first token, none.

    Args:
      config: of the layer.
      seq: arguments of `mamba3_scan` with axes [b, l, ...].
      weights: those without.
      state: the state before the first token; with one, sequences are not divided.
      **options: further arguments.
    """
    options |= {"implementation": config.scan_implementation, "chunk_size": config.chunk_size}
    if state is None:

        def of_pieces(seq: dict, weights: dict, axis: str | None) -> jax.Array:
            return mamba3_scan(**seq, **weights, **options, sequence_axis=axis)

        return on_own_pieces(of_pieces, seq, weights), None

    def of_rows(rows: dict, weights: dict) -> tuple[jax.Array, Mamba3State]:
        return mamba3_scan(**rows, **weights, **options, return_state=True)

    y, state = on_own_rows(of_rows, seq | {"initial_state": state}, weights)
    return y, state.stored_in(config.state_dtype, config.state_dtype)
