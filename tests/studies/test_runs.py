"""Runs in one program: each is what it would be alone, and none spoils another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3jax.studies.config import Span
from m3jax.studies.grid import Run, make_groups
from m3jax.studies.models import MODELS
from m3jax.studies.questions import draw_block
from m3jax.studies.runs import Recipe, cross_entropy, init_runs, over_runs, train_block
from tests.tolerances import assert_close, rounding

STEPS = 4


def train(study, group, steps=STEPS, train_block=train_block):
    """The state and the metrics after the first steps of a group."""
    seeds = sorted({run.seed for run in group.runs})
    numbers, span = jnp.arange(steps), Span(3, 8)
    questions = draw_block(
        jnp.array(seeds), numbers, jnp.full(steps, 3), jnp.full(steps, 8), task=group.task(span),
        batch_size=study.train.batch_size, width=group.width(span, False), answers=1, bos=False, packed=False,
    )  # fmt: skip
    t = study.train
    recipe = Recipe(group.model, study.optimizer, t.steps, t.runs_at_once, t.label_smoothing, t.ema_decay)
    state = init_runs(recipe, jnp.array([run.seed for run in group.runs]))
    rates = jnp.array([run.learning_rate for run in group.runs])
    data_of_run = jnp.array([seeds.index(run.seed) for run in group.runs])
    kind_and_place = jnp.stack([jnp.zeros_like(numbers), numbers], axis=1)
    return train_block(recipe, state, rates, data_of_run, jnp.int32(0), kind_and_place, (questions,))


def test_a_run_among_others_is_as_alone(small_study):
    study = small_study()
    (group,) = make_groups(study)
    overflows = Run(1e30, 1)
    together = dataclasses.replace(group, runs=(*group.runs, overflows))
    state, metrics = train(study, together)
    assert metrics.skipped.tolist() == [0, 0, 0, 0, (STEPS - 1) / STEPS]
    assert len({float(loss) for loss in metrics.loss[:4]}) == 4
    alone, own = train(study, dataclasses.replace(group, runs=group.runs[3:]))
    # Adam divides by the gradient's size: a relative error of the gradient moves an update by as much of the rate.
    terms = STEPS * study.train.batch_size * group.width(Span(3, 8), False) * group.model.d_model
    for (path, one), many in zip(jax.tree.leaves_with_path(alone.params), jax.tree.leaves(state.params), strict=True):
        assert_close(many[3], one[0], rounding(jnp.float32, terms), jax.tree_util.keystr(path))
    assert_close(metrics.loss[3:4], own.loss, rounding(jnp.float32, terms), "loss")


def test_few_runs_at_once_are_all_runs():
    matrices, vectors = jnp.arange(24.0).reshape(4, 3, 2), jnp.arange(8.0).reshape(4, 2)
    for at_once in (1, 2):
        assert (over_runs(jnp.matmul, at_once)(matrices, vectors) == jax.vmap(jnp.matmul)(matrices, vectors)).all()


def test_label_smoothing_is_that_of_optax():
    logits, targets = 3 * jax.random.normal(jax.random.key(0), (5, 7)), jnp.array([0, 6, 3, 3, 1])
    smooth = optax.smooth_labels(jax.nn.one_hot(targets, 7), 0.3)
    expected = optax.softmax_cross_entropy(logits, smooth)
    assert_close(cross_entropy(logits, targets, 0.3), expected, rounding(jnp.float32, 7), "loss")


def test_label_smoothing_reaches_the_steps(small_study):
    losses = {}
    for smoothing in (0.0, 0.5):
        study = small_study(train__label_smoothing=smoothing)
        (group,) = make_groups(study)
        losses[smoothing] = train(study, group, steps=1)[1].loss
    assert (losses[0.0] != losses[0.5]).all()


def test_moving_average_of_the_steps(small_study):
    study = small_study(train__ema_decay=0.75)
    (group,) = make_groups(study)
    first, second = (train(study, group, steps)[0] for steps in (1, 2))
    for (path, ema), of_first, last in zip(
        jax.tree.leaves_with_path(second.measured), *map(jax.tree.leaves, (first.ema, second.params)), strict=True
    ):
        terms = 2 * study.train.batch_size * group.width(Span(3, 8), False) * group.model.d_model
        assert_close(ema, 0.75 * of_first + 0.25 * last, rounding(jnp.float32, terms), jax.tree_util.keystr(path))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (second.ema, second.params)), strict=True))


def test_learning_rates_share_initialisation_and_data(small_study):
    study = small_study()
    (group,) = make_groups(study)
    state = init_runs(Recipe(group.model, study.optimizer, 12), jnp.array([run.seed for run in group.runs]))
    embedding = np.asarray(state.params["embedding"])
    assert (embedding[0] == embedding[2]).all() and (embedding[1] == embedding[3]).all()
    assert not (embedding[0] == embedding[1]).all()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_maps_over_runs(small_study, name):
    study = small_study(grid__tasks="parity:2", grid__models=name, grid__seeds=1, model__d_state=8)
    (group,) = make_groups(study)
    jax.eval_shape(functools.partial(train, study, group, 1, train_block.__wrapped__))
