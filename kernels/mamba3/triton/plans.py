"""How a shape is cut up into programs."""

import math

from ..inputs import Sequence
from .op import Plan

_ROWS = 64  # of a chunk: positions · rank
_PROGRAMS = 256  # that fill a large GPU, two to a multiprocessor


def choose_plan(seq: Sequence, chunk_size: int | None) -> Plan:
    """The plan for inputs of this shape."""
    batch, length, heads, _ = seq.x.shape
    rank, groups = seq.b.shape[2:4]
    positions = chunk_size or max(1, _ROWS // rank)
    chunks = math.ceil(length / positions)
    segments = max(1, min(chunks, round(_PROGRAMS / (batch * heads))))
    return Plan(
        positions=positions, segments=segments, warps=4, stages=2 if rank == 1 else 1, value_warps=4,
        key_heads=math.gcd(heads // groups, 8), key_warps=4,
    )  # fmt: skip
