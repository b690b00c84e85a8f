"""The scan on Triton kernels: what runs when, forward and backward, as a differentiable function of arrays."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..inputs import Sequence, Weights
from ..rotary import TWO_PI
from .backward import key_gradients, state_gradients, value_gradients
from .forward import forward
from .launch import launch
from .prepare import prepare

_PREPARE_TILE = 64
_PREPARE_PROGRAMS = 2048

_LOG2_E = 1.4426950408889634
# 2 to the power of anything lower is 0 in float32, and bounded terms keep running sums accurate.
_MIN_LOG2_DECAY = -152.0
# Never 0, so that the backward pass can divide by it.
_LEAST_SCALE = 1e-20


class Plan(NamedTuple):
    """How a shape is cut up."""

    positions: int  # of a chunk
    segments: int  # of the sequence, each walked by programs of its own
    warps: int
    stages: int  # chunks whose loads are in flight at once
    value_warps: int
    key_heads: int  # that one program sums the gradients of B and C over
    key_warps: int
    row_output: bool = False  # y of every rank instead of their sum


class Inputs(NamedTuple):
    """What the kernels read; letters as in `mamba3_scan`, dt, a, lam and omega in float32."""

    seq: Sequence
    weights: Weights
    ssm: (
        jax.Array
    )  # [b, h, p, n], coordinates in the kernels' order, the half step due before the first token folded in
    phase: jax.Array  # [b, h, s], radians
    document: jax.Array | None  # int32, [b, l]


class Prepared(NamedTuple):
    """Per head and position; see prepare.py."""

    dt: jax.Array  # [b, h, l], as all but phase
    phase: jax.Array  # [b, h, l, s]
    decay: jax.Array
    fine_decay: jax.Array
    gamma: jax.Array
    scale: jax.Array


def to_kernel_order(v: jax.Array, s: int) -> jax.Array:
    """Last axis from (real parts, imaginary parts, rest) to pairs side by side, then the rest."""
    pairs = jnp.stack([v[..., :s], v[..., s : 2 * s]], axis=-1).reshape(*v.shape[:-1], 2 * s)
    return jnp.concatenate([pairs, v[..., 2 * s :]], axis=-1)


def from_kernel_order(v: jax.Array, s: int) -> jax.Array:
    """The converse."""
    pairs = v[..., : 2 * s].reshape(*v.shape[:-1], s, 2)
    return jnp.concatenate([pairs[..., 0], pairs[..., 1], v[..., 2 * s :]], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(plan: Plan, inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y, and H and the phase in radians after the last token; documents do not reset the phase here."""
    prepared, last_phase = _prepare(plan, inputs)
    y, ssm, _ = _forward(plan, inputs, prepared, save=False)
    return y, ssm, last_phase


def _scan_forward(plan: Plan, inputs: Inputs):
    prepared, last_phase = _prepare(plan, inputs)
    y, ssm, chunk_ssm = _forward(plan, inputs, prepared, save=True)
    return (y, ssm, last_phase), (inputs, prepared, ssm, chunk_ssm)


def _scan_backward(plan: Plan, residuals, cotangents) -> tuple[Inputs]:
    inputs, prepared, ssm, chunk_ssm = residuals
    dy, dssm, dphase = cotangents
    s = inputs.phase.shape[-1]
    chunk_grad, first_grad = _state_gradients(plan, inputs, prepared, dy, dssm)
    parts = _value_gradients(plan, inputs, prepared, chunk_ssm, chunk_grad, dy)
    parts |= _key_gradients(plan, inputs, prepared, chunk_ssm, chunk_grad, dy)
    # What a step of the last chunk does to H beyond it.
    decay_flow = jnp.sum(dssm * ssm, axis=(-2, -1))  # [b, h]
    pairs = (v[..., : 2 * s].reshape(*v.shape[:-1], s, 2) for v in (dssm, ssm))
    gradient, state = pairs
    last_flow = jnp.sum(gradient[..., 1] * state[..., 0] - gradient[..., 0] * state[..., 1], axis=-2)  # [b, h, s]
    return (_combine(plan, inputs, parts, first_grad, decay_flow, last_flow, dphase),)


scan.defvjp(_scan_forward, _scan_backward)


def _padded(width: int, least: int) -> int:
    return max(least, 1 << (width - 1).bit_length()) if width else 0


def _constants(plan: Plan, inputs: Inputs) -> dict[str, object]:
    """What the kernels are compiled for; each takes those it names."""
    seq, weights = inputs.seq, inputs.weights
    heads, p = seq.x.shape[2:]
    rank, groups, n = seq.b.shape[2:]
    s = seq.omega.shape[-1]
    wide = seq.x.dtype == jnp.float32
    return {
        "H": heads, "G": groups, "R": rank, "P": p, "N": n, "S": s, "T": plan.positions,
        "PP": _padded(p, 16), "SP": _padded(s, 8) or 8, "UP": _padded(n - 2 * s, 16), "SEGMENTS": plan.segments,
        "OMEGA_HEADS": seq.omega.ndim == 4, "HAS_B_BIAS": weights.b_bias is not None,
        "HAS_C_BIAS": weights.c_bias is not None, "HAS_MIMO_X": weights.mimo_x is not None,
        "HAS_MIMO_Z": weights.mimo_z is not None, "HAS_MIMO_O": weights.mimo_o is not None,
        "HAS_D": weights.d is not None, "HAS_Z": seq.z is not None, "ROW_OUTPUT": plan.row_output,
        "HAS_DOC": inputs.document is not None, "EXACT": wide, "FAST": not wide,
        "PRECISION": "tf32x3" if wide else "tf32", "STAGES": plan.stages, "HEADS": plan.key_heads,
        "TILE": max(plan.positions, _PREPARE_TILE),
    }  # fmt: skip


def _run(kernel, arguments: list, scalars: dict, out: list, grid: tuple, warps: int, constants: dict) -> list:
    """Launches with the constants the kernel names; an absent array is one element that is never read."""
    absent = jnp.zeros((1,), jnp.float32)
    arguments = [absent if v is None else v for v in arguments]
    out = [jax.ShapeDtypeStruct((1,), jnp.float32) if v is None else v for v in out]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return launch(kernel, arguments, scalars, out, grid, warps, constants)


def _shape(*axes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)


def _prepare(plan: Plan, inputs: Inputs) -> tuple[Prepared, jax.Array]:
    seq = inputs.seq
    batch, length, heads = seq.dt.shape
    s = seq.omega.shape[-1]
    # Elementwise, transposed to [b, h, l] on the way: the kernels read a head's positions one after another.
    decay = jnp.maximum(seq.dt * seq.a * _LOG2_E, _MIN_LOG2_DECAY)
    gamma = seq.lam * seq.dt
    half_step = jnp.pad(((1 - seq.lam) * seq.dt)[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if inputs.document is not None:
        same = jnp.pad(inputs.document[:, 1:] == inputs.document[:, :-1], ((0, 0), (0, 1)))
        half_step = jnp.where(same[..., None], half_step, 0)
    scale = jnp.maximum(gamma + half_step, _LEAST_SCALE)
    dt, decay, gamma, scale = (jnp.swapaxes(v, 1, 2) for v in (seq.dt, decay, gamma, scale))

    constants = _constants(plan, inputs)
    tiles = math.ceil(length / constants["TILE"])
    segments = max(1, min(tiles, _PREPARE_PROGRAMS // (batch * heads)))
    scalars = {"length": length, "tiles": math.ceil(tiles / segments)}
    constants |= {"SEGMENTS": segments}
    grid = (segments, heads, batch)
    turns = inputs.phase / TWO_PI
    phase = ((turns - jnp.floor(turns + 0.5)) * 2.0**32).astype(jnp.int32)[:, :, None]  # [b, h, 1, s]
    totals = _shape(batch, heads, segments, max(s, 1), dtype=jnp.int32)
    if segments > 1 and s:
        *_, steps = _run(prepare, [dt, decay, seq.omega, None], scalars, [None, None, None, totals], grid, 4,
                         constants | {"TOTALS_ONLY": True})  # fmt: skip
        phase = jnp.concatenate([phase, steps[:, :, :-1]], axis=2)
        phase = jnp.cumsum(phase, axis=2, dtype=jnp.int32)
    sums = _shape(batch, heads, length)
    exact = constants["EXACT"]
    phases = _shape(batch, heads, length, max(s, 1), dtype=jnp.int32 if exact else jnp.int16)
    phases, sums, fine_sums, ends = _run(
        prepare, [dt, decay, seq.omega, phase], scalars, [phases, sums, sums if exact else None, totals], grid, 4,
        constants | {"TOTALS_ONLY": False},
    )  # fmt: skip
    last_phase = (ends[:, :, -1, :s].astype(jnp.float32) * (TWO_PI / 2.0**32)) % TWO_PI
    return Prepared(dt, phases, sums, fine_sums, gamma, scale), last_phase


def _grid(plan: Plan, inputs: Inputs) -> tuple[tuple[int, int, int], dict[str, int]]:
    batch, length, heads = inputs.seq.dt.shape
    chunks = math.ceil(length / plan.positions)
    return (plan.segments, heads, batch), {"length": length, "chunks": math.ceil(chunks / plan.segments)}


def _states(plan: Plan, inputs: Inputs, axis: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    batch, heads, p, n = inputs.ssm.shape
    return _shape(batch, heads, axis, p, n, dtype=dtype)


def _forward(plan: Plan, inputs: Inputs, prepared: Prepared, save: bool):
    """y, H after the last token, and H entering every chunk (if asked to save)."""
    seq, weights = inputs.seq, inputs.weights
    batch, length, heads, p = seq.x.shape
    grid, scalars = _grid(plan, inputs)
    constants = _constants(plan, inputs) | {"SAVE": save, "STATES_ONLY": False}
    given = [seq.x, seq.z, seq.b, seq.c, *weights[:6], inputs.document, *prepared[1:], inputs.ssm]
    decays = _shape(batch, heads, plan.segments)
    before = [None, None]
    if plan.segments > 1:
        _, *before, _ = _run(
            forward, [*given, None, None], scalars, [None, _states(plan, inputs, plan.segments), decays, None], grid,
            plan.warps, constants | {"STATES_ONLY": True, "SAVE": False},
        )  # fmt: skip
    rows = (seq.b.shape[2],) if plan.row_output else ()
    kept = _states(plan, inputs, math.ceil(length / plan.positions), seq.x.dtype) if save else None
    y, ssm, _, chunk_ssm = _run(
        forward, [*given, *before], scalars,
        [_shape(batch, length, heads, *rows, p, dtype=seq.x.dtype), _shape(*inputs.ssm.shape), None, kept],
        grid, plan.warps, constants,
    )  # fmt: skip
    return y, ssm, chunk_ssm


def _state_gradients(plan: Plan, inputs: Inputs, prepared: Prepared, dy: jax.Array, dssm: jax.Array):
    """Gradient of H after every chunk, and before the first."""
    seq, weights = inputs.seq, inputs.weights
    batch, length, heads, _ = seq.x.shape
    grid, scalars = _grid(plan, inputs)
    constants = _constants(plan, inputs) | {"STATES_ONLY": False}
    gate = seq.x if seq.z is None else seq.z  # tells the kernel the operands' dtype
    given = [gate, seq.c, weights.c_bias, weights.mimo_z, weights.mimo_o, inputs.document]
    given += [prepared.phase, prepared.decay, prepared.fine_decay, prepared.scale, dy, dssm]
    after = [None, None]
    if plan.segments > 1:
        _, *after = _run(
            state_gradients, [*given, None, None], scalars,
            [None, _states(plan, inputs, plan.segments), _shape(batch, heads, plan.segments)], grid, plan.warps,
            constants | {"STATES_ONLY": True},
        )  # fmt: skip
    chunk_grad, first_grad, _ = _run(
        state_gradients, [*given, *after], scalars,
        [_states(plan, inputs, math.ceil(length / plan.positions), seq.x.dtype), _shape(*inputs.ssm.shape), None],
        grid, plan.warps, constants,
    )  # fmt: skip
    return chunk_grad, first_grad


def _value_gradients(plan: Plan, inputs: Inputs, prepared: Prepared, chunk_ssm, chunk_grad, dy) -> dict[str, jax.Array]:
    """Gradients of x and z, and parts of those of the coefficients and of the weights on the values."""
    seq, weights = inputs.seq, inputs.weights
    batch, length, heads, p = seq.x.shape
    rank = seq.b.shape[2]
    chunks = math.ceil(length / plan.positions)
    per_position = _shape(batch, heads, length)

    def share(weight: jax.Array | None, *axes: int) -> jax.ShapeDtypeStruct | None:
        return None if weight is None else _shape(batch, chunks, heads, *axes)

    out = {
        "x": _shape(*seq.x.shape, dtype=seq.x.dtype),
        "z": None if seq.z is None else _shape(*seq.x.shape, dtype=seq.x.dtype),
        "scale": per_position,
        "gamma": per_position,
        "decay": per_position,
        "decay_flow": _shape(batch, heads, chunks),
        "d": share(weights.d),
        "mimo_x": share(weights.mimo_x, rank, p),
        "mimo_z": share(weights.mimo_z, rank, p),
        "mimo_o": share(weights.mimo_o, rank, p),
    }
    given = [seq.x, seq.z, seq.b, seq.c, *weights[:6], inputs.document, *prepared[1:], chunk_ssm, chunk_grad, dy]
    grid = (chunks, heads, batch)
    arrays = _run(value_gradients, given, {"length": length}, list(out.values()), grid, plan.value_warps,
                  _constants(plan, inputs))  # fmt: skip
    return dict(zip(out, arrays, strict=True))


def _key_gradients(plan: Plan, inputs: Inputs, prepared: Prepared, chunk_ssm, chunk_grad, dy) -> dict[str, jax.Array]:
    """Gradients of B, C and their biases, and the phase's parts of those of Δ and ω."""
    seq, weights = inputs.seq, inputs.weights
    batch, length, heads, _ = seq.x.shape
    rank, groups, n = seq.b.shape[2:]
    s = seq.omega.shape[-1]
    chunks, blocks = math.ceil(length / plan.positions), heads // plan.key_heads
    given = [seq.x, seq.z, prepared.dt, seq.omega, seq.b, seq.c, *weights[:5], inputs.document, *prepared[1:]]
    given += [chunk_ssm, chunk_grad, dy]
    found = []
    for turned, width in ((True, 2 * s), (False, n - 2 * s)):
        if not width:
            continue
        rows = _shape(blocks, batch, length, rank, width)
        biases = [None if v is None else _shape(batch, chunks, heads, rank, width)
                  for v in (weights.b_bias, weights.c_bias)]  # fmt: skip
        phases = [None, None, None]
        if turned:
            omega = seq.omega.shape if seq.omega.ndim == 4 else (blocks, *seq.omega.shape)
            phases = [_shape(*omega), _shape(batch, heads, length), _shape(batch, heads, chunks, s)]
        *arrays, domega, dturn, phase_flow = _run(
            key_gradients, given, {"length": length}, [rows, rows, *biases, *phases], (chunks, blocks, batch),
            plan.key_warps, _constants(plan, inputs) | {"TURNED": turned},
        )  # fmt: skip
        by_group = [v.reshape(groups, -1, *v.shape[1:]).sum(axis=1) for v in arrays[:2]]
        by_head = [None if absent is None else v.sum(axis=(0, 1)) for v, absent in zip(arrays[2:], biases, strict=True)]
        found.append([*by_group, *by_head])
        if turned:
            phase_parts = {"omega": domega, "turn": dturn, "phase_flow": phase_flow}
    names = ("b", "c", "b_bias", "c_bias")
    parts = {name: None if v[0] is None else jnp.concatenate(v, axis=-1)
             for name, v in zip(names, zip(*found, strict=True), strict=True)}  # fmt: skip
    return parts | (phase_parts if s else {})


def _combine(plan: Plan, inputs: Inputs, parts: dict, first_grad, decay_flow, last_flow, dphase) -> Inputs:
    """Gradients of the inputs from what the kernels wrote."""
    seq, weights = inputs.seq, inputs.weights
    batch, length, heads = seq.dt.shape
    s = seq.omega.shape[-1]
    chunks = math.ceil(length / plan.positions)

    def by_position(v: jax.Array) -> jax.Array:  # [b, h, chunks, ...] → [b, h, l, ...]
        return jnp.repeat(v, plan.positions, axis=2)[:, :, :length]

    def transposed(v: jax.Array) -> jax.Array:  # [b, h, l] → [b, l, h]
        return jnp.swapaxes(v, 1, 2)

    # Each chunk found the flow into it; a step needs the flow out of its own.
    out_of = jnp.concatenate([parts["decay_flow"][:, :, 1:], decay_flow[:, :, None]], axis=2)
    ddecay = transposed(parts["decay"] + by_position(out_of))
    dscale, dgamma = transposed(parts["scale"]), transposed(parts["gamma"])
    half_step = dscale[:, :-1]
    if inputs.document is not None:
        half_step = jnp.where((inputs.document[:, 1:] == inputs.document[:, :-1])[..., None], half_step, 0)
    half_step = jnp.pad(half_step, ((0, 0), (1, 0), (0, 0)))
    ddt = seq.a * ddecay + seq.lam * (dscale + dgamma) + (1 - seq.lam) * half_step
    dlam = seq.dt * (dscale + dgamma - half_step)
    domega, dstart = jnp.zeros_like(seq.omega), jnp.zeros_like(inputs.phase)
    if s:
        out_of = jnp.concatenate([parts["phase_flow"][:, :, 1:], last_flow[:, :, None]], axis=2)
        beyond = (last_flow + dphase)[:, :, None] - out_of  # [b, h, chunks, s]
        dstart = last_flow + dphase - parts["phase_flow"][:, :, 0]
        pad = chunks * plan.positions - length
        dt = jnp.pad(seq.dt, ((0, 0), (0, pad), (0, 0))).reshape(batch, chunks, plan.positions, heads)
        ddt += transposed(parts["turn"])
        if seq.omega.ndim == 4:
            step = jnp.swapaxes(by_position(beyond), 1, 2)  # [b, l, h, s]
            domega = parts["omega"] + step * seq.dt[..., None]
            ddt += jnp.sum(step * seq.omega, axis=-1)
        else:
            omega = jnp.pad(seq.omega, ((0, 0), (0, pad), (0, 0))).reshape(batch, chunks, plan.positions, s)
            exact = jax.lax.Precision.HIGHEST
            step = jnp.einsum("bmth,bhms->bmts", dt, beyond, precision=exact).reshape(batch, -1, s)
            domega = parts["omega"].sum(axis=0) + step[:, :length]
            turned = jnp.einsum("bmts,bhms->bmth", omega, beyond, precision=exact).reshape(batch, -1, heads)
            ddt += turned[:, :length]

    def ungrouped(v: jax.Array) -> jax.Array:  # [g, b, l, r, n] → [b, l, r, g, n]
        return jnp.moveaxis(v, 0, 3).astype(seq.b.dtype)

    def summed(name: str) -> jax.Array | None:
        weight = getattr(weights, name)
        if weight is None:
            return None
        total = parts[name] if name.endswith("bias") else parts[name].sum(axis=(0, 1))
        return total.astype(weight.dtype)

    dseq = Sequence(
        x=parts["x"], dt=ddt, a=seq.dt * ddecay, b=ungrouped(parts["b"]), c=ungrouped(parts["c"]), lam=dlam, omega=domega,
        z=None if seq.z is None else parts["z"],
    )  # fmt: skip
    dweights = Weights(**{name: summed(name) for name in Weights._fields if name != "norm_weight"}, norm_weight=None)
    document = None if inputs.document is None else jnp.zeros(inputs.document.shape, jax.dtypes.float0)
    return Inputs(seq=dseq, weights=dweights, ssm=first_grad, phase=dstart, document=document)
