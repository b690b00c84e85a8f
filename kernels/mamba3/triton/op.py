"""The scan on Triton kernels: what runs when, forward and backward, as a differentiable function of arrays."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ...products import rounds_float32
from ...residuals import SCAN_RESIDUALS
from ...triton_launch import launch
from ..cotangents import Parts, combine, phase_flow
from ..inputs import Inputs
from ..readout import readout
from ..rotary import TWO_PI
from .backward import flows, key_gradients, state_gradients, value_gradients
from .forward import forward
from .prepare import prepare

_PREPARE_TILE = 64
_PREPARE_PROGRAMS = 1024

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
    y, ssm, _, _ = _forward(plan, inputs, prepared, save=False)
    return y, ssm, last_phase


def _scan_forward(plan: Plan, inputs: Inputs):
    prepared, last_phase = _prepare(plan, inputs)
    kept = prepared, *_forward(plan, inputs, prepared, save=True)
    prepared, y, ssm, y_rows, chunk_ssm = checkpoint_name(kept, SCAN_RESIDUALS)
    return (y, ssm, last_phase), (inputs, prepared, ssm, y_rows, chunk_ssm)


def _scan_backward(plan: Plan, residuals, cotangents) -> tuple[Inputs]:
    inputs, prepared, ssm, y_rows, chunk_ssm = residuals
    dy, dssm, dphase = cotangents
    g, dz, dmimo_z, dmimo_o = _gate_gradients(plan, inputs, y_rows, dy)
    chunk_grad, first_grad = _state_gradients(plan, inputs, prepared, g, dssm)
    found = _flows(plan, inputs, ssm, dssm, chunk_ssm, chunk_grad)
    found |= _value_gradients(plan, inputs, prepared, chunk_grad, g)
    found |= _key_gradients(plan, inputs, prepared, chunk_ssm, chunk_grad, g)
    weights = {name: found.pop(name) for name in ("b_bias", "c_bias", "mimo_x", "d")}
    weights = inputs.weights._replace(**weights, mimo_z=dmimo_z, mimo_o=dmimo_o)
    start_flow = phase_flow(first_grad, inputs.ssm, inputs.phase.shape[-1], paired=True)
    parts = Parts(z=dz, weights=weights, ssm=first_grad, start_flow=start_flow, **found)
    return (combine(inputs, parts, plan.positions, dphase),)


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
        "PRECISION": "tf32x3" if wide and not rounds_float32() else "tf32", "STAGES": plan.stages,
        "HEADS": plan.key_heads, "TILE": max(plan.positions, _PREPARE_TILE),
    }  # fmt: skip


def _run(kernel, arguments: list, scalars: dict, out: list, grid: tuple, warps: int, constants: dict) -> list:
    """Launches with the constants the kernel names; an absent array is one element that is never read."""
    absent = jnp.zeros((1,), jnp.float32)
    arguments = [absent if v is None else v for v in arguments]
    out = [jax.ShapeDtypeStruct((1,), jnp.float32) if v is None else v for v in out]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return launch(kernel, arguments, scalars, out, grid, warps, constants, batch_axis=2)


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
    turns = (turns - jnp.floor(turns + 0.5))[:, :, None]  # [b, h, 1, s]
    exact = constants["EXACT"]
    phase = (turns * 2.0**32).astype(jnp.int32) if exact else turns
    omega = seq.omega if exact else seq.omega / TWO_PI
    totals = _shape(batch, heads, segments, max(s, 1), dtype=phase.dtype)
    if segments > 1 and s:
        *_, steps = _run(prepare, [dt, decay, omega, None], scalars, [None, None, None, totals], grid, 4,
                         constants | {"TOTALS_ONLY": True})  # fmt: skip
        phase = jnp.concatenate([phase, steps[:, :, :-1]], axis=2)
        phase = jnp.cumsum(phase, axis=2, dtype=phase.dtype)
    sums = _shape(batch, heads, length)
    phases = _shape(batch, heads, length, max(s, 1), dtype=jnp.int32 if exact else jnp.int16)
    phases, sums, fine_sums, ends = _run(
        prepare, [dt, decay, omega, phase], scalars, [phases, sums, sums if exact else None, totals], grid, 4,
        constants | {"TOTALS_ONLY": False},
    )  # fmt: skip
    last_phase = ends[:, :, -1, :s].astype(jnp.float32) * (TWO_PI / 2.0**32 if exact else TWO_PI) % TWO_PI
    return Prepared(dt, phases, sums, fine_sums, gamma, scale), last_phase


def _grid(plan: Plan, inputs: Inputs) -> tuple[tuple[int, int, int], dict[str, int]]:
    batch, length, heads = inputs.seq.dt.shape
    chunks = math.ceil(length / plan.positions)
    return (plan.segments, heads, batch), {"length": length, "chunks": math.ceil(chunks / plan.segments), "rows": batch}


def _states(inputs: Inputs, axis: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    batch, heads, p, n = inputs.ssm.shape
    return _shape(batch, heads, axis, p, n, dtype=dtype)


def _forward(plan: Plan, inputs: Inputs, prepared: Prepared, save: bool):
    """y, H after the last token, and if asked to save: y of every rank before the gate, H entering every chunk."""
    seq, weights = inputs.seq, inputs.weights
    batch, length, heads, p = seq.x.shape
    rank = seq.b.shape[2]
    grid, scalars = _grid(plan, inputs)
    constants = _constants(plan, inputs) | {"SAVE": save, "STATES_ONLY": False}
    given = [seq.x, seq.z, seq.b, seq.c, *weights[:6], inputs.document, *prepared[1:], inputs.ssm]
    decays = _shape(batch, heads, plan.segments)
    before = [None, None]
    if plan.segments > 1:
        _, *before, _, _ = _run(
            forward, [*given, None, None], scalars,
            [None, _states(inputs, plan.segments), decays, None, None], grid, plan.warps,
            constants | {"STATES_ONLY": True, "SAVE": False},
        )  # fmt: skip
    saved = [None, None]
    rows = _shape(batch, length, heads, rank, p, dtype=seq.x.dtype)
    if save:
        saved = [_states(inputs, math.ceil(length / plan.positions), seq.x.dtype), rows]
    y, ssm, _, chunk_ssm, y_rows = _run(
        forward, [*given, *before], scalars,
        [rows if plan.row_output else seq.x, _shape(*inputs.ssm.shape), None, *saved], grid, plan.warps, constants,
    )  # fmt: skip
    return y, ssm, y_rows, chunk_ssm


def _gate_gradients(plan: Plan, inputs: Inputs, y_rows: jax.Array, dy: jax.Array):
    """Gradients of y before the gate, [b, l, h, r, p], and of z, mimo_z and mimo_o."""
    seq, weights = inputs.seq, inputs.weights
    if plan.row_output:
        return dy, None, None, None

    def gated(y: jax.Array, z: jax.Array | None, *mimo: jax.Array | None) -> jax.Array:
        mimo_z, mimo_o = (None if w is None else w.astype(jnp.float32)[None, None] for w in mimo)
        return readout(y.astype(jnp.float32), y, z, None, mimo_z, mimo_o, None, 0.0)

    _, pullback = jax.vjp(gated, y_rows, seq.z, weights.mimo_z, weights.mimo_o)
    return pullback(dy.astype(jnp.float32))


def _state_gradients(plan: Plan, inputs: Inputs, prepared: Prepared, g: jax.Array, dssm: jax.Array):
    """Gradient of H after every chunk, and before the first."""
    seq, weights = inputs.seq, inputs.weights
    batch, length, heads, _ = seq.x.shape
    grid, scalars = _grid(plan, inputs)
    constants = _constants(plan, inputs) | {"STATES_ONLY": False}
    given = [g, seq.c, weights.c_bias, inputs.document]
    given += [prepared.phase, prepared.decay, prepared.fine_decay, prepared.scale, dssm]
    after = [None, None]
    if plan.segments > 1:
        _, *after = _run(
            state_gradients, [*given, None, None], scalars,
            [None, _states(inputs, plan.segments), _shape(batch, heads, plan.segments)], grid, plan.warps,
            constants | {"STATES_ONLY": True},
        )  # fmt: skip
    chunk_grad, first_grad, _ = _run(
        state_gradients, [*given, *after], scalars,
        [_states(inputs, math.ceil(length / plan.positions), seq.x.dtype), _shape(*inputs.ssm.shape), None],
        grid, plan.warps, constants,
    )  # fmt: skip
    return chunk_grad, first_grad


def _flows(plan: Plan, inputs: Inputs, ssm, dssm, chunk_ssm, chunk_grad) -> dict[str, jax.Array]:
    """What a step of the decay, [b, h, chunks], or of a phase, [b, h, chunks, s], does beyond its chunk through H."""
    batch, heads, chunks = chunk_ssm.shape[:3]
    s = inputs.phase.shape[-1]
    flow = {
        "decay_flow": jnp.sum(dssm * ssm, axis=(-2, -1))[:, :, None],
        "phase_flow": phase_flow(dssm, ssm, s, paired=True)[:, :, None],
    }
    if chunks > 1:
        before = _run(
            flows, [chunk_ssm, chunk_grad], {"length": inputs.seq.x.shape[1]},
            [_shape(batch, heads, chunks), _shape(batch, heads, chunks, max(s, 1))],
            (chunks - 1, heads, batch), 4, _constants(plan, inputs),
        )  # fmt: skip
        flow["decay_flow"] = jnp.concatenate([before[0][:, :, :-1], flow["decay_flow"]], axis=2)
        flow["phase_flow"] = jnp.concatenate([before[1][:, :, :-1, :s], flow["phase_flow"]], axis=2)
    return flow


def _value_gradients(plan: Plan, inputs: Inputs, prepared: Prepared, chunk_grad, g) -> dict[str, jax.Array]:
    """Gradient of x, and parts of those of the coefficients, D and mimo_x."""
    seq, weights = inputs.seq, inputs.weights
    batch, length, heads, p = seq.x.shape
    rank = seq.b.shape[2]
    chunks = math.ceil(length / plan.positions)
    per_position = _shape(batch, heads, length)
    out = {
        "x": seq.x,
        "scale": per_position,
        "gamma": per_position,
        "d": None if weights.d is None else _shape(batch, chunks, heads),
        "mimo_x": None if weights.mimo_x is None else _shape(batch, chunks, heads, rank, p),
    }
    given = [seq.x, seq.b, seq.c, weights.b_bias, weights.c_bias, weights.mimo_x, weights.d, inputs.document]
    given += [*prepared[1:], chunk_grad, g]
    arrays = _run(value_gradients, given, {"length": length, "rows": batch}, list(out.values()), (chunks, heads, batch),
                  plan.value_warps, _constants(plan, inputs))  # fmt: skip
    found = dict(zip(out, arrays, strict=True))
    return found | {name: None if out[name] is None else found[name].sum(axis=(0, 1)) for name in ("d", "mimo_x")}


def _key_gradients(plan: Plan, inputs: Inputs, prepared: Prepared, chunk_ssm, chunk_grad, g) -> dict[str, jax.Array]:
    """Gradients of B, C, their biases and the log decay inside a chunk, and the phase's parts of those of Δ and ω."""
    seq, weights = inputs.seq, inputs.weights
    batch, length, heads, _ = seq.x.shape
    rank, _, n = seq.b.shape[2:]
    s = seq.omega.shape[-1]
    chunks, blocks = math.ceil(length / plan.positions), heads // plan.key_heads
    domega_shape = seq.omega.shape if seq.omega.ndim == 4 else (blocks, *seq.omega.shape)
    parts, decays = {"omega": None, "turn": None}, {}
    for name, own, other, own_bias, other_bias, states in (
        ("b", seq.b, seq.c, weights.b_bias, weights.c_bias, chunk_grad),
        ("c", seq.c, seq.b, weights.c_bias, weights.b_bias, chunk_ssm),
    ):
        given = [seq.x, g, prepared.dt, seq.omega, own, other, own_bias, other_bias, weights.mimo_x, inputs.document]
        given += [*prepared[1:], states]
        has_biases = {"HAS_OWN_BIAS": own_bias is not None, "HAS_OTHER_BIAS": other_bias is not None}
        down, dbias, domega, dturn, decays[name] = _run(
            key_gradients, given, {"length": length, "rows": batch},
            [_shape(blocks, batch, length, rank, n),
             None if own_bias is None else _shape(batch, chunks, heads, rank, n),
             _shape(*domega_shape) if s else None, _shape(batch, heads, length) if s else None,
             _shape(batch, heads, length)],
            (chunks, blocks, batch), plan.key_warps,
            _constants(plan, inputs) | has_biases | {"OF_B": name == "b"},
        )  # fmt: skip
        parts[name] = down
        parts[f"{name}_bias"] = None if own_bias is None else dbias.sum(axis=(0, 1))
        if s:
            parts["omega"] = domega if parts["omega"] is None else parts["omega"] + domega
            parts["turn"] = dturn if parts["turn"] is None else parts["turn"] + dturn
    return parts | {"decay": decays["c"] - decays["b"]}
