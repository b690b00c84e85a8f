"""The scan's arguments as one pytree, and the checks that reject bad ones before anything compiles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .state import Mamba3State


class Sequence(NamedTuple):
    """Arrays with a sequence axis (dropped in a single step). Letters as in `mamba3_scan`."""

    x: jax.Array  # [b, l, h, p]
    dt: jax.Array  # [b, l, h]
    a: jax.Array  # [b, l, h]
    b: jax.Array  # [b, l, r, g, n]
    c: jax.Array  # [b, l, r, g, n]
    lam: jax.Array  # [b, l, h]
    omega: jax.Array  # [b, l, s] or [b, l, h, s]
    z: jax.Array | None  # [b, l, h, p]


class Weights(NamedTuple):
    """Arrays without a sequence axis; None = absent."""

    b_bias: jax.Array | None  # [h, r, n]
    c_bias: jax.Array | None  # [h, r, n]
    mimo_x: jax.Array | None  # [h, r, p]
    mimo_z: jax.Array | None  # [h, r, p]
    mimo_o: jax.Array | None  # [h, r, p]
    d: jax.Array | None  # [h]
    norm_weight: jax.Array | None  # [h, p]


class Inputs(NamedTuple):
    """What the kernels read; letters as in `mamba3_scan`, dt, a, lam and omega in float32."""

    seq: Sequence
    weights: Weights
    ssm: jax.Array | None  # H before the first token, [b, h, p, n], the half step due to the one before it folded in
    phase: jax.Array | None  # before the first token, [b, h, s], radians; None = zeros, to the Mosaic GPU kernels
    document: jax.Array | None  # int32, [b, l], other than before where one begins; Triton's: numbers from 0 up


def accumulator_dtype(x: jax.Array) -> jnp.dtype:
    """float64 for float64 inputs, else float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def check_inputs(
    seq: Sequence, weights: Weights, state: Mamba3State | None, segment_ids: jax.Array | None, has_length: bool
) -> None:
    """Checks shapes and dtypes.

    Raises:
      ValueError: names the argument, its shape and the expected one.
      TypeError: an argument that is not floating point (or segment_ids not integer).
    """
    length = ["l"] if has_length else []
    rank_axis = 2 if has_length else 1
    if seq.x.ndim != 3 + has_length or seq.b.ndim != 4 + has_length:
        raise ValueError(
            f"x must be [{', '.join(['b', *length, 'h', 'p'])}] and b [{', '.join(['b', *length, 'r', 'g', 'n'])}]; "
            f"got shapes {seq.x.shape} and {seq.b.shape}."
        )
    sizes = {"b": seq.x.shape[0], "h": seq.x.shape[-2], "p": seq.x.shape[-1], "s": seq.omega.shape[-1]}
    sizes |= {"r": seq.b.shape[rank_axis], "g": seq.b.shape[-2], "n": seq.b.shape[-1]}
    if sizes["b"] == 0:
        raise ValueError("The batch is empty: x has no rows.")
    if has_length:
        sizes["l"] = seq.x.shape[1]
        if sizes["l"] == 0:
            raise ValueError("The sequence is empty: x has length 0.")
    omega_axes = ["b", *length, "s"] if seq.omega.ndim == 2 + has_length else ["b", *length, "h", "s"]
    expected = {
        "x": (seq.x, ["b", *length, "h", "p"]),
        "z": (seq.z, ["b", *length, "h", "p"]),
        "omega": (seq.omega, omega_axes),
        **{name: (getattr(seq, name), ["b", *length, "h"]) for name in ("dt", "a", "lam")},
        **{name: (getattr(seq, name), ["b", *length, "r", "g", "n"]) for name in ("b", "c")},
        **{name: (getattr(weights, name), ["h", "r", "n"]) for name in ("b_bias", "c_bias")},
        **{name: (getattr(weights, name), ["h", "r", "p"]) for name in ("mimo_x", "mimo_z", "mimo_o")},
        "d": (weights.d, ["h"]),
        "norm_weight": (weights.norm_weight, ["h", "p"]),
    }
    if state is not None:
        expected |= {
            "state.angle": (state.angle, ["b", "h", "s"]),
            "state.ssm": (state.ssm, ["b", "h", "p", "n"]),
            "state.b": (state.b, ["b", "h", "r", "n"]),
            "state.x": (state.x, ["b", "h", "p"]),
        }
    for name, (array, axes) in expected.items():
        _check_array(name, array, axes, sizes)
    if sizes["h"] % sizes["g"]:
        raise ValueError(f"The number of groups g = {sizes['g']} (axis of b) must divide the heads h = {sizes['h']}.")
    if 2 * sizes["s"] > sizes["n"]:
        raise ValueError(
            f"omega has s = {sizes['s']} angles; the state width n = {sizes['n']} allows {sizes['n'] // 2}."
        )
    if segment_ids is not None:
        if segment_ids.shape != (sizes["b"], sizes["l"]):
            raise ValueError(
                f"segment_ids has shape {segment_ids.shape}; expected [b, l] = {(sizes['b'], sizes['l'])}."
            )
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids has dtype {segment_ids.dtype}; expected integers.")


def _check_array(name: str, array: jax.Array | None, axes: list[str], sizes: dict[str, int]) -> None:
    if array is None:
        return
    shape = tuple(sizes[axis] for axis in axes)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected [{', '.join(axes)}] = {shape}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {array.dtype}; expected a floating-point dtype.")
