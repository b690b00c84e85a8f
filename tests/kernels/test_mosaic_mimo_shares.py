"""How the programs of the Mosaic GPU MIMO gradients share out heads of chunks."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_triton", exc_type=ImportError)
pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)

from m3jax.kernels.mamba3.mosaic import mimo_shares

SIZES = [(2, 5, 6, 2), (1, 3, 4, 4), (1, 1, 1, 1), (3, 7, 8, 1)]


@pytest.mark.parametrize(("batch", "chunks", "heads", "groups"), SIZES)
@pytest.mark.parametrize("programs", [1, 5, 132])
def test_every_head_of_every_chunk_has_one_program(monkeypatch, batch, chunks, heads, groups, programs):
    monkeypatch.setattr(mimo_shares, "PROGRAMS", programs)
    shares = mimo_shares.share(batch, chunks, heads, groups)
    found, group = [], None
    for program in range(shares.programs):
        first, end = (int(v) for v in shares.of(jnp.int32(program)))
        assert end - first in (shares.least, shares.least + 1) and end > first
        slot = None
        for step in range(first, end):
            index, chunk, head, of = shares.place(jnp.int32(step))
            found.append((int(index), int(chunk), int(head)))
            assert int(of.number) == ((index * chunks + chunk) * groups + head // shares.per_group)
            assert int(of.member) == head % shares.per_group
            # Neighbouring groups of a program have different slots, a group's heads the same.
            assert slot is None or (slot == int(of.slot)) == (group == int(of.number))
            group, slot = int(of.number), int(of.slot)
    assert found == list(np.ndindex(batch, chunks, heads))
