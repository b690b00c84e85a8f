"""The read-out of y of every rank as two Triton kernels, which read everything once; the gradient keeps only y and z.

Per head and position, with all of it optional but y:

    u_r = y_r / √(mean(y_r²) + ε)        o = Σ_r u_r ⊙ w ⊙ silu(z ⊙ mimo_z_r) ⊙ mimo_o_r

A tile has T positions of one head. Gradients of weights are sums over positions, of which a program adds up its own.

y is [b, l, h, r, p], or as the Mosaic kernels write it for several ranks, [b, h, chunks, rows, p], rows in the order of
mosaic/mimo_pieces.py and chunks of SPAN positions, of which the last may be longer than the sequence.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from ...triton_launch import launch
from ..inputs import Sequence, Weights
from .pieces import sigmoid

_ROWS = 64  # of a tile: ranks times positions
_TILES, _WARPS = 8, 8  # of a program


@triton.jit
def _axes(T: tl.constexpr, R: tl.constexpr, PP: tl.constexpr):
    """Positions in a tile, ranks and columns, [T, 1, 1], [1, R, 1] and [1, 1, PP]."""
    return tl.arange(0, T)[:, None, None], tl.arange(0, R)[None, :, None], tl.arange(0, PP)[None, None, :]


@triton.jit
def _places(t, rank, length, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, SPAN: tl.constexpr):
    """Where y of a rank begins at a position, [T, R, 1]."""
    head = tl.program_id(1)
    batch = tl.program_id(2)
    if SPAN == 0:
        at = ((batch * length + t).to(tl.int64) * H + head) * R + rank
    else:
        within = t % SPAN
        row = (rank // 2) * (2 * SPAN) + (within // 8) * 16 + (rank % 2) * 8 + within % 8
        chunk = (batch * H + head) * tl.cdiv(length, SPAN) + t // SPAN
        at = chunk.to(tl.int64) * (SPAN * R) + row
    return at * P


@triton.jit
def _weight(ptr, at, exists, HAS: tl.constexpr):
    """float32, of ones if there is none."""
    v = tl.where(exists, 1.0, 0.0)
    if HAS:
        v = tl.load(ptr + at, mask=exists, other=0.0).to(tl.float32)
    return v


@triton.jit
def _normed(y, norm_eps, P: tl.constexpr, HAS_NORM: tl.constexpr):
    """u, and what y is multiplied by."""
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(y * y, 2, keep_dims=True) / P + norm_eps)
    return y * scale, scale


@triton.jit
def forward(
    y_ptr, z_ptr, norm_ptr, mimo_z_ptr, mimo_o_ptr, norm_eps, length,
    out_ptr,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, T: tl.constexpr, SPAN: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_NORM: tl.constexpr, HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr,
    FAST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """o from y and z, which is like o, [b, l, h, p]."""
    head = tl.program_id(1)
    batch = tl.program_id(2)
    within, rank, p = _axes(T, R, PP)
    weight_at, in_p = (head * R + rank) * P + p, p < P
    norm = _weight(norm_ptr, head * P + p, in_p, HAS_NORM)
    mimo_z = _weight(mimo_z_ptr, weight_at, in_p, HAS_MIMO_Z)
    mimo_o = _weight(mimo_o_ptr, weight_at, in_p, HAS_MIMO_O)
    for tile in range(tl.program_id(0) * TILES, tl.program_id(0) * TILES + TILES):
        t = tile * T + within
        exists = (t < length) & in_p
        at = ((batch * length + t).to(tl.int64) * H + head) * P + p
        y = tl.load(y_ptr + _places(t, rank, length, H, R, P, SPAN) + p, mask=exists, other=0.0).to(tl.float32)
        out, _ = _normed(y, norm_eps, P, HAS_NORM)
        out *= norm * mimo_o
        if HAS_Z:
            gate = tl.load(z_ptr + at, mask=exists, other=0.0).to(tl.float32) * mimo_z
            out *= gate * sigmoid(gate, FAST)
        out = tl.sum(out, 1, keep_dims=True)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def backward(
    y_ptr, z_ptr, norm_ptr, mimo_z_ptr, mimo_o_ptr, do_ptr, norm_eps, length,
    dy_ptr, dz_ptr, dnorm_ptr, dmimo_z_ptr, dmimo_o_ptr,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, T: tl.constexpr, SPAN: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_NORM: tl.constexpr, HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr,
    FAST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradients of y and z, and those of the weights by program, [b, programs, h, p] and [b, programs, h, r, p]."""
    head = tl.program_id(1)
    batch = tl.program_id(2)
    within, rank, p = _axes(T, R, PP)
    weight_at, in_p = (head * R + rank) * P + p, p < P
    norm = _weight(norm_ptr, head * P + p, in_p, HAS_NORM)
    mimo_z = _weight(mimo_z_ptr, weight_at, in_p, HAS_MIMO_Z)
    mimo_o = _weight(mimo_o_ptr, weight_at, in_p, HAS_MIMO_O)
    # Sums over positions at the end: each passes numbers between warps.
    dnorm = tl.zeros((T, R, PP), tl.float32)
    dmimo_z, dmimo_o = dnorm, dnorm
    for tile in range(tl.program_id(0) * TILES, tl.program_id(0) * TILES + TILES):
        t = tile * T + within
        exists = (t < length) & in_p
        at = ((batch * length + t).to(tl.int64) * H + head) * P + p
        y_at = _places(t, rank, length, H, R, P, SPAN) + p
        y = tl.load(y_ptr + y_at, mask=exists, other=0.0).to(tl.float32)
        do = tl.load(do_ptr + at, mask=exists, other=0.0).to(tl.float32)
        u, scale = _normed(y, norm_eps, P, HAS_NORM)
        dv = do * mimo_o
        of_o = do * u * norm
        if HAS_Z:
            z = tl.load(z_ptr + at, mask=exists, other=0.0).to(tl.float32)
            gate = z * mimo_z
            half = sigmoid(gate, FAST)
            silu = gate * half
            dgate = dv * u * norm * (half + silu * (1 - half))
            dv *= silu
            of_o *= silu
            dz = tl.sum(dgate * mimo_z, 1, keep_dims=True)
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=exists)
            dmimo_z += dgate * z
        dmimo_o += of_o
        if HAS_NORM:
            dnorm += dv * u
            dv *= norm
            dv = scale * (dv - u * (tl.sum(dv * u, 2, keep_dims=True) / P))
        in_rows = exists  # of y, where the rest of the last chunk gets zeros
        if SPAN > 0:
            in_rows = (t < tl.cdiv(length, SPAN) * SPAN) & in_p
        tl.store(dy_ptr + y_at, dv.to(dy_ptr.dtype.element_ty), mask=in_rows)
    program = (batch * tl.num_programs(0) + tl.program_id(0)) * H
    if HAS_NORM:
        dnorm = tl.sum(tl.sum(dnorm, 1, keep_dims=True), 0, keep_dims=True)
        tl.store(dnorm_ptr + (program + head) * P + p, dnorm, mask=in_p)
    if HAS_MIMO_Z:
        tl.store(dmimo_z_ptr + program * R * P + weight_at, tl.sum(dmimo_z, 0, keep_dims=True), mask=in_p)
    if HAS_MIMO_O:
        tl.store(dmimo_o_ptr + program * R * P + weight_at, tl.sum(dmimo_o, 0, keep_dims=True), mask=in_p)


def read_rows(y: jax.Array, seq: Sequence, weights: Weights, norm_eps: float, span: int = 0) -> jax.Array:
    """What `readout.readout` does, but for the skip, to y of every rank.

    Args:
      y: [b, l, h, r, p], or in rows of chunks.
      seq: of which x's shape and z are read.
      weights: of which those named mimo_z, mimo_o and norm_weight are.
      norm_eps: epsilon of the norm.
      span: positions of a chunk, if y is in rows.

    Returns:
      [b, l, h, p], in y's dtype.
    """
    how = _How(norm_eps, seq.x.shape, y.shape[3] // max(span, 1), span)
    return _read(how, y, seq.z, weights.norm_weight, weights.mimo_z, weights.mimo_o)


class _How(NamedTuple):
    """What is known when compiling, besides the arrays."""

    norm_eps: float
    shape: tuple[int, ...]  # of the output
    rank: int
    span: int

    @property
    def positions(self) -> int:
        """Of a tile."""
        return max(_ROWS // self.rank, 1)

    @property
    def programs(self) -> int:
        """Of a sequence."""
        span = max(self.span, 1)
        return math.ceil(math.ceil(self.shape[1] / span) * span / (self.positions * _TILES))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(how: _How, y: jax.Array, *optional: jax.Array | None) -> jax.Array:
    return _run(forward, how, [y, *optional], [jax.ShapeDtypeStruct(how.shape, y.dtype)])[0]


def _read_forward(how: _How, y: jax.Array, *optional: jax.Array | None):
    return _read(how, y, *optional), (y, *optional)


def _read_backward(how: _How, saved: tuple[jax.Array | None, ...], do: jax.Array):
    y, z, *weights = saved
    programs = how.shape[0] * how.programs
    partial = [None if w is None else jax.ShapeDtypeStruct((programs, *w.shape), jnp.float32) for w in weights]
    dy, dz, *sums = _run(backward, how, [*saved, do], [y, z, *partial])
    return dy, dz, *(None if v is None else v.sum(axis=0).astype(w.dtype) for v, w in zip(sums, weights, strict=True))


_read.defvjp(_read_forward, _read_backward)


def _run(kernel, how: _How, arrays: list, out: list) -> list[jax.Array | None]:
    """Launches; what is absent, given or to be written, is one element that is not looked at."""
    batch, length, heads, p = how.shape
    y, *optional = arrays[:5]
    has = dict(zip(("HAS_Z", "HAS_NORM", "HAS_MIMO_Z", "HAS_MIMO_O"), (v is not None for v in optional), strict=True))
    absent = jnp.zeros((1,), y.dtype)
    written = launch(
        kernel, [absent if v is None else v for v in arrays],
        {"norm_eps": np.float32(how.norm_eps), "length": length},
        [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (absent if v is None else v for v in out)],
        (how.programs, heads, batch), _WARPS,
        {"H": heads, "R": how.rank, "P": p, "PP": triton.next_power_of_2(p), "T": how.positions, "SPAN": how.span,
         "TILES": _TILES, **has, "FAST": y.dtype != jnp.float32},
    )  # fmt: skip
    return [None if wanted is None else v for v, wanted in zip(written, out, strict=True)]
