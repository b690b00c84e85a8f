"""Gradients of a scan's inputs from what the kernels of a backward pass leave.

Notation: m chunks of a sequence, k blocks of heads; J turns a coordinate pair by a right angle; G is the gradient of H.
A step of the log decay scales H after it, a step of a phase turns B, C and H after it. Kernels add up what that does in
its own chunk. What it does beyond is found at the chunk's end, where H is all that passes on:

    decay flow = <G, H>        phase flow = <G, J H> of every pair, summed over p, while later phases stay

A step of a phase turns all that comes later too, and turning everything changes nothing. So what it does beyond its
chunk is minus the phase flow there, but for the last H and the last phase, which are read as they stand.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .inputs import Inputs, Sequence, Weights

_EXACT = jax.lax.Precision.HIGHEST
LEAST_LOG_DECAY = -16.6  # of 2^-24, half a unit in the last place of 1 in float32


class Parts(NamedTuple):
    """What kernels have found; float32 [b, h, l] if nothing else is said."""

    x: jax.Array  # [b, l, h, p], as z
    z: jax.Array | None
    b: jax.Array  # [k, b, l, r, n], as c
    c: jax.Array
    weights: Weights  # float32
    decay: jax.Array  # of a step's log decay, inside its chunk
    scale: jax.Array  # of s_j = γ_j + (1 - λ_{j+1}) Δ_{j+1}
    gamma: jax.Array  # of γ
    turn: jax.Array | None  # of Δ by the phases inside the chunk, None if s = 0
    omega: jax.Array | None  # of ω inside the chunk, [k, b, l, s] or, if it has heads, [b, l, h, s]
    decay_flow: jax.Array  # [b, h, m]; the last is of H after the last token, as below
    phase_flow: jax.Array | None  # [b, h, m, s]
    ssm: jax.Array | None  # of H before the first token, [b, h, p, n], if there is one
    start_flow: jax.Array | None  # phase flow before the first token, [b, h, s], likewise


def phase_flow(grad: jax.Array, ssm: jax.Array, s: int, paired: bool) -> jax.Array:
    """Derivative with respect to turning H by each phase: [b, h, p, n] twice → [b, h, s].

    `paired`: whether the parts of a pair are neighbours, or all real parts come first.
    """
    pairs, axis = ((s, 2), -1) if paired else ((2, s), -2)
    grad, ssm = (v[..., : 2 * s].reshape(*v.shape[:-1], *pairs) for v in (grad, ssm))
    # Whole rows are added up, and pairs taken apart when little is left: slices inside a sum are slow.
    sums = jnp.sum(grad * jnp.flip(ssm, axis), axis=-3)
    real, imag = (jnp.take(sums, part, axis) for part in range(2))
    return imag - real


def combine(inputs: Inputs, parts: Parts, positions: int, dphase: jax.Array | None) -> Inputs:
    """Gradients of the inputs.

    `positions` of a chunk; `dphase`: gradient of the phase after the last token, [b, h, s], None = zeros.
    """
    seq = inputs.seq
    ddt, da, dlam = _of_coefficients(inputs, parts, positions)
    domega, dstart = jnp.zeros_like(seq.omega), None if inputs.phase is None else jnp.zeros_like(inputs.phase)
    if seq.omega.shape[-1]:
        # H after the last token turns with every phase before it; H before the first with none.
        last_flow = parts.phase_flow[:, :, -1]
        if dphase is not None:
            last_flow = last_flow + dphase
        if inputs.phase is not None:
            dstart = last_flow if parts.start_flow is None else last_flow - parts.start_flow
        step, turned = of_later_phases(seq, last_flow[:, :, None] - parts.phase_flow, positions)
        domega = (parts.omega if seq.omega.ndim == 4 else parts.omega.sum(axis=0)) + step
        ddt = ddt + turned
    groups = seq.b.shape[3]

    def ungrouped(v: jax.Array) -> jax.Array:  # [k, b, l, r, n] → [b, l, r, g, n]
        return jnp.moveaxis(v.reshape(groups, -1, *v.shape[1:]).sum(axis=1), 0, 3)

    db, dc = ungrouped(parts.b), ungrouped(parts.c)
    dseq = Sequence(x=parts.x, dt=ddt, a=da, b=db, c=dc, lam=dlam, omega=domega, z=parts.z)
    return gathered(inputs, dseq, parts.weights, parts.ssm, dstart)


def gathered(inputs: Inputs, seq: Sequence, weights: Weights, ssm: jax.Array | None, phase: jax.Array | None) -> Inputs:
    """Gradients by input, in the dtypes of the inputs."""
    seq, weights = (
        jax.tree.map(lambda given, grad: grad.astype(given.dtype), *both)
        for both in ((inputs.seq, seq), (inputs.weights, weights))
    )
    document = None if inputs.document is None else jnp.zeros(inputs.document.shape, jax.dtypes.float0)
    return Inputs(seq=seq, weights=weights, ssm=ssm, phase=phase, document=document)


def _of_coefficients(inputs: Inputs, parts: Parts, positions: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of Δ, A and λ, [b, l, h], but for what reaches Δ through phases beyond its chunk."""
    seq = inputs.seq
    decay = parts.decay + _by_position(parts.decay_flow, positions, parts.decay.shape[2])
    decay, scale, gamma = (jnp.swapaxes(v, 1, 2) for v in (decay, parts.scale, parts.gamma))
    half_step = scale[:, :-1]
    if inputs.document is not None:
        same = (inputs.document[:, 1:] == inputs.document[:, :-1])[..., None]
        half_step = jnp.where(same, half_step, 0)
        # A document's first token lets nothing in, whatever its decay.
        decay = jnp.where(jnp.pad(same, ((0, 0), (1, 0), (0, 0)), constant_values=True), decay, 0)
    # Sums that cancel: where too little passes a step to be seen, they leave their rounding, which A multiplies.
    decay = jnp.where(seq.dt * seq.a < LEAST_LOG_DECAY, 0, decay)
    half_step = jnp.pad(half_step, ((0, 0), (1, 0), (0, 0)))
    ddt = seq.a * decay + seq.lam * (scale + gamma) + (1 - seq.lam) * half_step
    if parts.turn is not None:
        ddt = ddt + jnp.swapaxes(parts.turn, 1, 2)
    return ddt, seq.dt * decay, seq.dt * (scale + gamma - half_step)


def of_later_phases(seq: Sequence, beyond: jax.Array, positions: int) -> tuple[jax.Array, jax.Array]:
    """Gradients of ω and Δ [b, l, h] from those of a step of the phases beyond its chunk, [b, h, m, s]."""
    batch, length, heads = seq.dt.shape
    chunks, s = beyond.shape[2:]
    if seq.omega.ndim == 4:
        step = jnp.swapaxes(_by_position(beyond, positions, length), 1, 2)  # [b, l, h, s]
        return step * seq.dt[..., None], jnp.sum(step * seq.omega, axis=-1)

    def chunked(v: jax.Array) -> jax.Array:  # [b, l, ...] → [b, m, positions, ...]
        v = jnp.pad(v, ((0, 0), (0, chunks * positions - length), (0, 0)))
        return v.reshape(batch, chunks, positions, v.shape[2])

    step = jnp.einsum("bmth,bhms->bmts", chunked(seq.dt), beyond, precision=_EXACT).reshape(batch, -1, s)
    turned = jnp.einsum("bmts,bhms->bmth", chunked(seq.omega), beyond, precision=_EXACT).reshape(batch, -1, heads)
    return step[:, :length], turned[:, :length]


def _by_position(v: jax.Array, positions: int, length: int) -> jax.Array:
    """[b, h, m, ...] → [b, h, l, ...]."""
    return jnp.repeat(v, positions, axis=2)[:, :, :length]
