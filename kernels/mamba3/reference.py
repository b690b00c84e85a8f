"""The recurrence, one token at a time: the definition the other implementations are measured against, and decoding.

Notation (b batch, l length, h heads, p head width, n state width, g groups, r rank, s angles):

    φ_t = φ_{t-1} + Δ_t ω_t mod 2π                                  B, C rotate by φ_t after their biases
    α_t = exp(Δ_t A_t)    β_t = (1 - λ_t) Δ_t α_t    γ_t = λ_t Δ_t
    H_t = α_t H_{t-1} + β_t Σ_r x_{t-1,r} ⊗ B_{t-1,r} + γ_t Σ_r x_{t,r} ⊗ B_{t,r}      (Mamba-3, Proposition 1)
    y_{t,r} = H_t C_{t,r} + D x_{t,r}                                then norm, gate and sum over ranks (readout.py)

Everything is computed in float32, or float64 for float64 inputs.
"""

import functools

import jax
import jax.numpy as jnp

from .inputs import Sequence, Weights, accumulator_dtype
from .readout import readout
from .rotary import rotate, wrap_angle
from .state import Mamba3State

_EXACT = jax.lax.Precision.HIGHEST


@functools.partial(jax.jit, static_argnames="norm_eps")
def step(token: Sequence, weights: Weights, state: Mamba3State, norm_eps: float) -> tuple[jax.Array, Mamba3State]:
    """One token. Arguments as `Sequence` without the length axis; returns y [b, h, p] and the next state."""
    acc = accumulator_dtype(token.x)
    dt, a, lam, omega = (v.astype(acc) for v in (token.dt, token.a, token.lam, token.omega))
    heads = token.x.shape[1]

    omega = omega if omega.ndim == 3 else omega[:, None, :]
    angle = wrap_angle(state.angle.astype(acc) + dt[..., None] * omega)  # [b, h, s]
    b = rotate(_per_head(token.b, weights.b_bias, heads, acc), angle[:, :, None, :])  # [b, h, r, n]
    c = rotate(_per_head(token.c, weights.c_bias, heads, acc), angle[:, :, None, :])
    x = _per_rank(token.x, weights.mimo_x, b.shape[2], acc)  # [b, h, r, p]
    x_prev = _per_rank(state.x, weights.mimo_x, b.shape[2], acc)

    alpha = jnp.exp(dt * a)[..., None]  # [b, h, 1]
    beta = ((1 - lam) * dt)[..., None] * alpha
    gamma = (lam * dt)[..., None]
    ssm = (
        alpha[..., None] * state.ssm.astype(acc)
        + jnp.einsum("bhrp,bhrn->bhpn", x_prev * beta[..., None], state.b.astype(acc), precision=_EXACT)
        + jnp.einsum("bhrp,bhrn->bhpn", x * gamma[..., None], b, precision=_EXACT)
    )
    y = jnp.einsum("bhpn,bhrn->bhrp", ssm, c, precision=_EXACT)

    def per_head(w: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
        return None if w is None else w.astype(acc).reshape(shape)

    full = (1, *y.shape[1:])
    out = readout(
        y, x, token.z,
        per_head(weights.d, (1, heads, 1, 1)),
        per_head(weights.mimo_z, full), per_head(weights.mimo_o, full),
        per_head(weights.norm_weight, (1, heads, 1, y.shape[-1])),
        norm_eps,
    )  # fmt: skip
    return out.astype(token.x.dtype), Mamba3State(angle=angle, ssm=ssm, b=b, x=token.x)


@functools.partial(jax.jit, static_argnames="norm_eps")
def scan(
    seq: Sequence, weights: Weights, state: Mamba3State, segment_ids: jax.Array | None, norm_eps: float
) -> tuple[jax.Array, Mamba3State]:
    """The recurrence over a sequence; returns y [b, l, h, p] and the state after the last token."""
    batch, length = seq.x.shape[:2]
    starts = jnp.zeros((batch, length), bool)
    if segment_ids is not None:
        starts = starts.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])

    def body(carry: Mamba3State, inputs: tuple[Sequence, jax.Array]) -> tuple[Mamba3State, jax.Array]:
        token, start = inputs
        carry = jax.tree.map(lambda v: jnp.where(start.reshape((-1,) + (1,) * (v.ndim - 1)), 0, v), carry)
        y, carry = step(token, weights, carry, norm_eps)
        return carry, y

    inputs = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (seq, starts))
    acc = accumulator_dtype(seq.x)
    state = state.accumulating(acc, seq.x.dtype)
    state, y = jax.lax.scan(body, state, inputs)
    return jnp.moveaxis(y, 0, 1), state


def _per_head(v: jax.Array, bias: jax.Array | None, heads: int, acc: jnp.dtype) -> jax.Array:
    """[b, r, g, n] → [b, h, r, n] with the bias [h, r, n] added."""
    v = jnp.repeat(jnp.moveaxis(v.astype(acc), 1, 2), heads // v.shape[2], axis=1)
    return v if bias is None else v + bias.astype(acc)[None]


def _per_rank(x: jax.Array, mimo_x: jax.Array | None, rank: int, acc: jnp.dtype) -> jax.Array:
    """[b, h, p] → [b, h, r, p]."""
    x = jnp.repeat(x.astype(acc)[:, :, None, :], rank, axis=2)
    return x if mimo_x is None else x * mimo_x.astype(acc)[None]
