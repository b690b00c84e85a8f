"""Batches: where answers are due, the token before, lengths of a curriculum, independence of seeds and steps."""

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.data.tasks import get_task
from m3jax.studies.questions import draw_block, draw_packed, draw_questions
from tests.data.tasks import oracles


def test_answers_are_where_the_task_wants_them():
    for name, bos in (("parity", True), ("s3", False)):
        task = get_task(name)
        width = task.positions(9)
        batch = task.sample(jax.random.key(0), 16, 3, 9, width)
        asked = draw_questions(jax.random.key(0), task, 16, 3, 9, width + bos, task.answers(9), bos)
        assert (asked.tokens[:, bos:] == batch.tokens).all()
        assert not bos or (asked.tokens[:, 0] == task.vocab_size).all()
        assert (asked.real.sum(axis=1) == batch.mask.sum(axis=1)).all()
        found = np.zeros_like(batch.targets)
        rows = np.broadcast_to(np.arange(16)[:, None], asked.positions.shape)
        found[rows, asked.positions - bos] = np.where(asked.real, asked.targets, 0)
        assert (found == np.where(batch.mask, batch.targets, 0)).all()


def test_block_follows_the_curriculum_and_its_steps():
    task = get_task("parity")
    options = {"task": task, "batch_size": 64, "width": 11, "answers": 1, "bos": False, "packed": False}
    steps, shortest, longest = jnp.arange(10, 14), jnp.full(4, 3), jnp.array([4, 4, 12, 6])
    seeds = jnp.array([5, 7])
    block = draw_block(seeds, steps, shortest, longest, **options)
    assert block.tokens.shape == (4, 2, 64, 11) and block.targets.shape == (4, 2, 64, 1)
    lengths = np.asarray((block.tokens > 0).sum(axis=-1)) + 1
    assert (lengths.max(axis=(1, 2)) == longest).all() and (lengths.min(axis=(1, 2)) == 3).all()
    # A step's draw depends on its number and seed, not on the block or the other seeds.
    alone = draw_block(seeds[1:], steps[2:], shortest[2:], longest[2:], **options)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b[2:, 1:]).all()), alone, block))
    assert not (block.tokens[0, 0] == block.tokens[1, 0]).all()
    assert not (block.tokens[0, 0] == block.tokens[0, 1]).all()


def test_packed_rows_hold_two_whole_sequences():
    task, rows, shortest, longest, bos = get_task("modular_arithmetic_brackets"), 128, 4, 13, True
    width = task.positions(shortest) + task.positions(longest) + 2 * bos
    packed = jax.tree.map(
        np.asarray, draw_packed(jax.random.key(0), task, 2 * rows, shortest, longest, width, task.answers(longest), bos)
    )
    assert packed.tokens.shape == packed.documents.shape == (rows, width) and packed.real.all()
    lengths = []
    for tokens, documents, positions, targets in zip(
        packed.tokens.tolist(), packed.documents, packed.positions, packed.targets.tolist(), strict=True
    ):
        begins = int(np.argmax(documents))
        assert documents.tolist() == [0] * begins + [1] * (width - begins) and positions[0] == begins - 1
        for start, position, target in zip((0, begins), positions, targets, strict=True):
            sequence = tokens[start : position + 1]
            assert sequence.pop(0) == task.vocab_size
            lengths.append(len(sequence) + 2)  # of its place of the answer and a token of padding
            answers = oracles.brackets([*sequence, 0, 11], lengths[-1])
            assert answers == {len(sequence) - 1: target}
    # Lengths under 5 are 5: the pairs 4 and 13 add up to one more than the others.
    assert set(np.add(lengths[::2], lengths[1::2])) == {shortest + longest, shortest + longest + 1}
    # Nine lengths, drawn evenly; the least has two chances of the ten. Four standard deviations of the counts.
    counts = np.bincount(lengths, minlength=longest + 1)[5:]
    expected = 2 * rows * np.array([2, *[1] * 8]) / 10
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected)).all()
