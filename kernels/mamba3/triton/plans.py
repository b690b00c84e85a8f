"""How a shape is cut up into programs: measured plans of the device at hand (plans.json), else rules.

experiments/latency/tune.py measures and rewrites the table.
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax

from ...gpu import compute_capability
from ..inputs import Sequence
from .op import Plan

TABLE = Path(__file__).with_name("plans.json")
_ROWS = 64  # of a chunk: positions · rank
_PROGRAMS = 256  # that fill a large GPU, two to a multiprocessor
# States of so many numbers, n · p, pass from chunk to chunk at little cost; where so many, batch · heads, do so side by
# side, short chunks are faster than products of many rows.
_SMALL_STATE, _MANY_STATES, _SHORT_CHUNK = 512, 2048, 16
# Kilobytes that a program may have; other capabilities have 99. The kernels' needs are in docs/performance.md.
_SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
_SMALL_SHARED_MEMORY = 99
# On Blackwell (100 and up), Triton 3.6's pipeliner fails on loops like these.
_PIPELINED = (80, 90)
_forced: Plan | None = None


def choose_plan(seq: Sequence, chunk_size: int | None) -> Plan:
    """The plan for inputs of this shape: the table's for its bucket, or the rules'."""
    plan = rules(seq, chunk_size)
    if _forced is not None:
        return _fitted(_forced, seq)
    tuned = _table().get(jax.local_devices()[0].device_kind, {}).get(bucket(seq))
    if tuned is not None:
        plan = plan._replace(**tuned["plan"])
    if chunk_size is not None:
        plan = plan._replace(positions=chunk_size)
    return _fitted(plan, seq)


@contextlib.contextmanager
def forced(plan: Plan) -> Iterator[None]:
    """What is traced inside uses this plan: for measuring plans."""
    global _forced
    before, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = before


def rules(seq: Sequence, chunk_size: int | None = None) -> Plan:
    """The plan for a device and shape that nobody measured, and if given for chunks of about that size."""
    batch, length, heads, p = seq.x.shape
    rank, groups, n = seq.b.shape[2:]
    many_small = rank == 1 and n * p <= _SMALL_STATE and batch * heads >= _MANY_STATES and seq.x.dtype.itemsize == 4
    if many_small and (chunk_size is None or chunk_size <= _SHORT_CHUNK):
        return Plan(positions=_SHORT_CHUNK, segments=1, warps=1, stages=1, value_warps=1, key_heads=1, key_warps=1)
    positions = max(1, _ROWS // rank)
    segments = max(1, min(math.ceil(length / positions), round(_PROGRAMS / (batch * heads))))
    pipelined = rank == 1 and seq.x.dtype.itemsize == 2 and n * p <= 128 * 64 and compute_capability() in _PIPELINED
    return Plan(
        positions=positions, segments=segments, warps=4, stages=2 if pipelined else 1, value_warps=4,
        key_heads=math.gcd(heads // groups, 8), key_warps=4,
    )  # fmt: skip


def bucket(seq: Sequence) -> str:
    """The table's key: what a plan depends on, sizes rounded to powers of two."""
    batch, length, heads, p = seq.x.shape
    rank, groups, n = seq.b.shape[2:]
    rows, long = (1 << round(math.log2(size)) for size in (batch * heads, length))
    return f"{seq.x.dtype} rank {rank} p {p} n {n} heads/group {heads // groups} batch*heads {rows} length {long}"


def too_large(p: int, n: int) -> str | None:
    """Why tiles of this size do not fit into the device's shared memory; None if they do."""
    limit = _SHARED_MEMORY.get(compute_capability(), _SMALL_SHARED_MEMORY)
    if n * p > 128 * 128 and limit == _SMALL_SHARED_MEMORY:
        return f"n · p = {n * p} needs more than the {limit} KB of shared memory of this GPU"
    return None


def _fitted(plan: Plan, seq: Sequence) -> Plan:
    """The plan with no more segments than chunks, and blocks of heads that divide a group."""
    heads, groups = seq.x.shape[2], seq.b.shape[3]
    return plan._replace(
        segments=min(plan.segments, math.ceil(seq.x.shape[1] / plan.positions)),
        key_heads=math.gcd(heads // groups, plan.key_heads),
    )


@functools.cache
def _table() -> dict[str, dict[str, dict]]:
    return json.loads(TABLE.read_text())
