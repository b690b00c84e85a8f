"""One head's gradients in the Mosaic GPU SISO backward, by the warpgroup SCORES or by VALUES.

Notation, and where the two wait for one another, as in gradients.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .pieces import (
    COEFFICIENTS,
    DECAY,
    HALF,
    OTHER,
    OWN,
    STEP_HIGH,
    STEP_LOW,
    TO_END,
    WG,
    N,
    P,
    S,
    T,
    cols,
    iotas,
    load_cols,
    load_rows,
    load_tile,
    meet,
    pick,
    publish,
    rows,
    stash,
    tile,
    turning,
    unstash,
    widen,
)
from .products import column_sums, stash_turns, turn_by_hand, unstash_turns
from .triangles import anticausal_ones, selectors, triangle
from .wgmma import begin, product, settle

FIRST, SECOND = pl.ds(0, HALF), pl.ds(HALF, HALF)  # columns: what turns, and what does not
_PART = 16  # columns
# Rows of what is written per position and head, float32 [T] each: g·x; C·B; <H', G> by coordinate; what L_i scales as a
# query and as a key; the phases' part of Δ's gradient.
VECTORS = 6
OVERLAP, SCORE, FLOW, QUERY, KEY, TURN = range(VECTORS)
_OWN_SCORES, _TURNED_FLOW = 2, 3  # rows of shared memory after the two of phases; of the latter there are two


class Gradients(NamedTuple):
    """What the kernel writes."""

    x: jax.Array  # [b, l, h, P] bfloat16
    z: jax.Array | None  # likewise
    b: jax.Array  # [blocks, b, l, N] float32; bfloat16 if a block is all heads of its group
    c: jax.Array  # likewise
    biases: jax.Array  # of B and C, [b, chunks, h, 2, N] float32: sums over the heads of a block up to this one
    vectors: jax.Array  # [b, h, chunks, VECTORS, T] float32
    omega: jax.Array  # [blocks, b, l, S] float32


class Shared(NamedTuple):
    """Shared memory of a program; of two heads, or of B and C, where a first axis of 2 is not explained."""

    raw: jax.Array
    rot: jax.Array
    states: jax.Array  # H and H'
    grad: jax.Array
    x: jax.Array
    z: jax.Array | None
    g: jax.Array  # dy as it arrives
    products: jax.Array  # weights, dS, and, as wide, ω
    turns: jax.Array
    phase: jax.Array
    coefficients: jax.Array
    starts: jax.Array
    biases: jax.Array
    raw_here: jax.Array  # barriers of what arrives
    x_here: jax.Array
    small_here: jax.Array
    states_here: jax.Array
    free: jax.Array  # the others, see gradients.py
    ready: jax.Array
    mixed: jax.Array
    scored: jax.Array
    flowed: jax.Array

    @staticmethod
    def types(gated: bool, simulated: bool) -> "Shared":
        """What to allocate."""
        values, floats = tile(2, T, P), lambda *shape: plgpu.SMEM(shape, jnp.float32)
        return Shared(
            tile(2, T, N), tile(2, T, N), tile(2, P, N), tile(2, P, N), values, values if gated else None, values,
            tile(3, T, T), floats(2, T, S) if simulated else floats(T, S), floats(T, S), floats(2, COEFFICIENTS, T),
            floats(5, T), floats(2, 2, N),
            plgpu.Barrier(num_arrivals=3), plgpu.Barrier(num_arrivals=2 + gated, num_barriers=2),
            plgpu.Barrier(num_arrivals=4, num_barriers=2), plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(), plgpu.Barrier(), plgpu.Barrier(),
        )  # fmt: skip

    @property
    def rotated(self):
        """B and C."""
        return self.rot.at[0], self.rot.at[1]

    @property
    def mixes(self):
        """Weights, later sums of dφ, and dS."""
        return self.products.at[0], self.products.at[1]

    @property
    def rate(self):
        """ω, in the two parts that products take."""
        return self.products.at[2]

    @property
    def score(self):
        """C_i·B_i."""
        return self.starts.at[_OWN_SCORES]

    @property
    def turned_flows(self):
        """<G, J H'> of two heads, in two parts of S."""
        return self.starts.at[pl.ds(_TURNED_FLOW, 2)]


class Place(NamedTuple):
    """Which heads of which chunk a program has."""

    index: jax.Array  # of the batch
    block: jax.Array
    chunk: jax.Array
    span: pl.Slice  # positions
    heads: int

    def at(self, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Slot in shared memory and number of a program's head k."""
        return lax.rem(k, 2), self.number(k)

    def number(self, k: jax.Array) -> jax.Array:
        """Of a program's head k among all."""
        return self.block * self.heads + k

    def ask_next(self, ask: Callable, k: jax.Array) -> None:
        """Asks for what head k + 1 needs, if there is one."""
        pl.when(k + 1 < self.heads)(lambda: ask(k + 1))


class Side(NamedTuple):
    """What a warpgroup has for all heads of its program."""

    shared: Shared
    place: Place
    out: Gradients  # of references
    simulated: bool

    def from_rest(self, rest: jax.Array):
        """Of what products add to: 0 for what turns, as its gradient still has to, and the other's total so far."""
        return begin(jnp.concatenate([zeros(HALF), rest], axis=1), self.simulated)

    def add_up_columns(self, total: tuple[jax.Array, jax.Array], which: int, head: jax.Array, scratch) -> None:
        """Writes gradients of biases: sums over positions of the total so far, of B (0) or C (1)."""
        target = self.out.biases.at[self.place.index, self.place.chunk, head, which]
        column_sums(jnp.concatenate(total, axis=1), target, scratch, self.simulated)


class Found(NamedTuple):
    """What SCORES finds once."""

    row: jax.Array
    column: jax.Array
    chosen: jax.Array
    omega: jax.Array  # float32 [T, S]


def zeros(width: int) -> jax.Array:
    """float32 [T, width]."""
    return plgpu.layout_cast(jnp.zeros((T, width), jnp.float32), WG)


def find(side: Side) -> Found:
    """Before the first head of SCORES, of which there is no flow yet."""
    row, column = iotas()
    chosen = selectors(row, column, side.simulated)
    omega = widen(load_tile(side.shared.rate), side.simulated)
    omega = omega[:, :S] + omega[:, S:]
    for slot in range(2):
        side.shared.turned_flows[slot] = plgpu.layout_cast(jnp.zeros((T,), jnp.float32), WG.reduce(1))
    return Found(row, column, chosen, omega)


def step_of(shared: Shared, k: jax.Array) -> jax.Array:
    """Δ of head k."""
    here = shared.coefficients.at[lax.rem(k, 2)]
    return load_rows(here.at[STEP_HIGH]) + load_rows(here.at[STEP_LOW])


def phase_sums(side: Side, found: Found, q, k: jax.Array, slot: jax.Array, step: jax.Array, domega: jax.Array):
    """Adds head k's part to dω, and writes that of Δ: from sums of dφ and, in its slot, <G, J H'>."""
    place, turned_flow = side.place, side.shared.turned_flows.at[slot]
    beyond = load_cols(turned_flow.at[pl.ds(0, S)]) - load_cols(turned_flow.at[pl.ds(S, S)])
    q = (q[:, :S] + q[:, S:]) + cols(beyond, T)
    side.out.vectors[place.index, place.number(k), place.chunk, TURN] = jnp.sum(q * found.omega, axis=1)
    return domega + rows(step, S) * q


def scores(side: Side, found: Found, ask_after: Callable, k: jax.Array, carry: tuple) -> tuple:
    """Head k of SCORES: what is rotated, weights, dS and dC; and what is left of the head before, dω and its part of Δ.

    Args:
      side: of SCORES.
      found: from `find`.
      ask_after: called with a head, asks for G after it and H'.
      k: of the program's heads.
      carry: the totals of dC and dω.
    """
    shared, place, simulated = side.shared, side.place, side.simulated
    row, column, chosen, _ = found
    (rot_b, rot_c), (weights, dscores) = shared.rotated, shared.mixes
    *total, domega = carry
    slot, head = place.at(k)
    here, vectors = shared.coefficients.at[slot], side.out.vectors.at[place.index, head, place.chunk]
    x_tile, g_tile, biases = shared.x.at[slot], shared.g.at[slot], shared.biases.at[slot]
    plgpu.barrier_wait(shared.small_here.at[slot])

    def rest(which):
        bias = load_cols(biases.at[which, SECOND]).astype(jnp.bfloat16)
        return load_tile(shared.raw.at[which, :, SECOND]) + cols(bias, T)

    start = shared.starts.at[slot, pl.ds(0, S)]
    cos, sin = turn_by_hand(here, start, shared.rate, chosen, simulated)
    turned = [turning(shared.raw.at[which], biases.at[pl.ds(which, 1)], cos, sin, simulated) for which in range(2)]
    rests = [rest(which) for which in range(2)]
    before = jnp.maximum(k - 1, 0)  # for the first, sums of the zeros that were in `weights`, and no flow
    step = step_of(shared, before)
    plgpu.barrier_wait(shared.free)
    for target, half, other in zip((rot_b, rot_c), turned, rests, strict=True):
        target[:, FIRST] = half
        target[:, SECOND] = other
    stash_turns(shared.turns, cos, sin, simulated)
    publish(simulated)
    plgpu.barrier_arrive(shared.ready)
    meet(simulated)
    q = product(None, anticausal_ones(chosen, simulated), weights, simulated)
    score = product(None, rot_c, rot_b, simulated, b_t=True)
    decay = load_rows(here.at[DECAY])
    mix = jnp.exp2(rows(decay, T) - cols(load_cols(here.at[OTHER]), T))
    gamma = jnp.exp2(load_rows(here.at[OWN]))
    domega = phase_sums(side, found, settle(q, 1, simulated), before, 1 - slot, step, domega)
    meet(simulated)  # no product reads `weights` any more
    plgpu.barrier_wait(shared.x_here.at[slot])
    plgpu.barrier_wait(shared.ready)
    overlaps = product(None, g_tile, x_tile, simulated, b_t=True)
    score = settle(score, 1, simulated)
    weights[...] = triangle((score * mix).astype(jnp.bfloat16), None, chosen, simulated)
    own = pick(score, row, column, 0, simulated)
    shared.score[...] = own
    scaled = load_tile(g_tile) * rows(jnp.exp2(decay).astype(jnp.bfloat16), P)
    overlaps = settle(overlaps, 0, simulated)
    overlap = pick(overlaps, row, column, 0, simulated)
    narrow = triangle((overlaps * mix).astype(jnp.bfloat16), gamma * overlap, chosen, simulated)
    dscores[...] = narrow
    publish(simulated)
    plgpu.barrier_arrive(shared.mixed)
    vectors[SCORE] = own
    vectors[OVERLAP] = overlap
    plgpu.barrier_wait(shared.states_here)
    dc = product(side.from_rest(total[1]), scaled, shared.states.at[0], simulated)
    dc = product(dc, narrow, rot_b, simulated)
    dc = settle(dc, 0, simulated)
    stash(shared.phase, _phase(dc, rot_c, simulated), simulated)
    plgpu.barrier_arrive(shared.scored)
    total = _with_turned_back(total[0], dc, shared.turns, simulated)
    plgpu.barrier_wait(shared.flowed)
    side.add_up_columns(total, 1, head, shared.states.at[1])
    publish(simulated)
    meet(simulated)
    place.ask_next(ask_after, k)
    plgpu.barrier_arrive(shared.free)
    return *total, domega


def values(side: Side, d, chunks: int, ask: Callable, ask_ssm: Callable, k: jax.Array, total: tuple) -> tuple:
    """Head k of VALUES: g, dz, dX, dB, flows out of the chunk, and sums of dφ for SCORES.

    Args:
      side: of VALUES.
      d: reference to D.
      chunks: of the sequence.
      ask: called with a head, asks for its x, z, dy and coefficients.
      ask_ssm: likewise, for H before it.
      k: of the program's heads.
      total: of dB.
    """
    shared, place, simulated = side.shared, side.place, side.simulated
    (rot_b, rot_c), (weights, dscores) = shared.rotated, shared.mixes
    slot, head = place.at(k)
    here, vectors = shared.coefficients.at[slot], side.out.vectors.at[place.index, head, place.chunk]
    x_tile, g_tile, grad, skip = shared.x.at[slot], shared.g.at[slot], shared.grad.at[slot], d[head]
    z_tile = None if shared.z is None else shared.z.at[slot]
    plgpu.barrier_wait(shared.small_here.at[slot])
    plgpu.barrier_wait(shared.x_here.at[slot])
    if z_tile is not None:
        _gate(g_tile, z_tile, simulated)
    plgpu.barrier_arrive(shared.ready)
    plgpu.barrier_wait(shared.states_here)
    plgpu.barrier_wait(shared.ready)

    # The other slot's dx and dz have left it.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    place.ask_next(ask, k)
    decay, to_end = jnp.exp2(load_rows(here.at[DECAY])), load_rows(here.at[TO_END])
    gamma = jnp.exp2(load_rows(here.at[OWN]))

    y, dx = _through_states(side, slot, vectors, chunks, decay, to_end)
    plgpu.barrier_arrive(shared.flowed)
    plgpu.barrier_wait(shared.mixed)
    y = product(begin(y, simulated), weights, x_tile, simulated)
    dx = product(begin(dx, simulated), weights, g_tile, simulated, a_t=True)
    kept = skip + gamma * load_rows(shared.score)
    x, g = load_tile(x_tile), load_tile(g_tile)
    scaled = x * rows(to_end.astype(jnp.bfloat16), P)
    y = settle(y, 1, simulated)
    if z_tile is None:
        vectors[QUERY], _ = _along(y, g, x, kept, None, simulated)
    else:
        vectors[QUERY], z_tile[...] = _along(y, g, x, kept, load_tile(z_tile), simulated)
    db = product(side.from_rest(total[1]), scaled, grad, simulated)
    db = product(db, dscores, rot_c, simulated, a_t=True)
    vectors[KEY], narrow = _along(settle(dx, 2, simulated), x, g, kept, None, simulated)
    meet(simulated)  # no product reads x or weights any more
    x_tile[...] = narrow
    db = settle(db, 0, simulated)
    dphase = _phase(db, rot_b, simulated)
    total = _with_turned_back(total[0], db, shared.turns, simulated)
    plgpu.barrier_wait(shared.scored)
    place.ask_next(ask_ssm, k)
    dphase = dphase + unstash(shared.phase, simulated)
    high = dphase.astype(jnp.bfloat16)
    low = (dphase - widen(high, simulated)).astype(jnp.bfloat16)
    weights[...] = jnp.concatenate([high, low], axis=1)
    publish(simulated)
    meet(simulated)
    if z_tile is not None:
        plgpu.copy_smem_to_gmem(z_tile, side.out.z.at[place.index, place.span, head])
    plgpu.copy_smem_to_gmem(x_tile, side.out.x.at[place.index, place.span, head])
    side.add_up_columns(total, 0, head, rot_b)
    plgpu.barrier_arrive(shared.free)
    return total


def _gate(g_tile, z_tile, simulated: bool) -> None:
    """Puts g in place of dy, and dy silu'(z) in place of z."""
    half = widen(load_tile(z_tile) * jnp.bfloat16(0.5), simulated)
    tanh = jnp.tanh(half)
    dy = widen(load_tile(g_tile), simulated)
    twice = dy * tanh + dy  # 2 dy sigmoid(z)
    g = twice * half
    g_tile[...] = g.astype(jnp.bfloat16)
    z_tile[...] = (twice + (g - g * tanh)).astype(jnp.bfloat16) * jnp.bfloat16(0.5)
    publish(simulated)


def _through_states(
    side: Side, slot: jax.Array, vectors, chunks: int, decay: jax.Array, to_end: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What of y and dX comes through H and G, float32 [T, P]; writes <H', G> and, for SCORES, <G, J H'>."""
    shared, simulated = side.shared, side.simulated
    (rot_b, rot_c), ssm, following, grad = (
        shared.rotated,
        shared.states.at[0],
        shared.states.at[1],
        shared.grad.at[slot],
    )
    y = product(None, rot_c, ssm, simulated, b_t=True)
    dx = product(None, rot_b, grad, simulated, b_t=True)
    flow = product(None, grad.at[:, FIRST], following.at[:, FIRST], simulated, a_t=True)
    y = settle(y, 2, simulated) * rows(decay, P)
    dx = settle(dx, 1, simulated) * rows(to_end, P)
    flow = settle(flow, 0, simulated)
    row, column = iotas()
    has_next = jnp.where(side.place.chunk + 1 < chunks, jnp.float32(1), jnp.float32(0))
    shared.turned_flows[slot] = pick(flow, row, column, S, simulated) * has_next
    flow = product(begin(flow, simulated), grad.at[:, SECOND], following.at[:, SECOND], simulated, a_t=True)
    vectors[FLOW] = pick(settle(flow, 0, simulated), row, column, 0, simulated)
    return y, dx


def _phase(down: jax.Array, rotated, simulated: bool) -> jax.Array:
    """What turning `rotated` by each phase does to what its gradient `down` is of: float32 [T, S]."""
    v = widen(load_tile(rotated.at[:, FIRST]), simulated)
    return down[:, S : 2 * S] * v[:, :S] - down[:, :S] * v[:, S:]


def _with_turned_back(total: jax.Array, down: jax.Array, turns, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """Total gradient of B or C, of what turns with this head's, from that of what is rotated, and of the rest."""
    cos, sin = unstash_turns(turns, simulated)
    real, imag = down[:, :S], down[:, S : 2 * S]
    turned = [(total[:, :S] + real * cos) + imag * sin, (total[:, S:] + imag * cos) - real * sin]
    return jnp.concatenate(turned, axis=1), down[:, 2 * S :]


def _along(v: jax.Array, left, right, kept, factor, simulated: bool) -> tuple[jax.Array, jax.Array]:
    """Sums of v ⊙ left over columns, and (v + kept ⊙ right) ⊙ factor in bfloat16; a few columns at a time."""
    products, out = 0, []
    for first in range(0, P, _PART):
        part = slice(first, first + _PART)
        one = v[:, part]
        products += one * widen(left[:, part], simulated)
        one = one + rows(kept, _PART) * widen(right[:, part], simulated)
        if factor is not None:
            one = one * widen(factor[:, part], simulated)
        out.append(one.astype(jnp.bfloat16))
    return jnp.sum(products, axis=1), jnp.concatenate(out, axis=1)
