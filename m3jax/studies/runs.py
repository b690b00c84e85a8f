"""Many runs of one model in one program: parameters, optimizer state and learning rates have runs as their first axis.

Every run computes what it would alone; a run that meets a value that is not finite keeps its parameters in that step.

Letters: r runs, s seeds, n steps of a block, b sequences, w positions, k supervised positions.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from m3jax.config import ModelConfig, OptimizerConfig
from m3jax.kernels.gpu import no_triton_here, partitioned
from m3jax.models.language_model import LanguageModel
from m3jax.studies.questions import INITIALISATION, Questions, stream
from m3jax.training.optimizer import make_optimizer
from m3jax.training.schedule import make_schedule

PyTree = Any
# Rows of a scan's chunk: what costs least at state and head widths of 64 (docs/state_tracking.md).
_CHUNK_ROWS = 40  # in plain JAX
_TRITON_CHUNK_ROWS = 32  # of the gated delta rule, which is plain JAX but for a kernel


@dataclass(frozen=True)
class Recipe:
    """What all runs of a compiled program share."""

    model: ModelConfig
    optimizer: OptimizerConfig  # without its learning rate
    steps: int  # of the whole schedule
    runs_at_once: int = 0  # computed together; 0 = all
    label_smoothing: float = 0.0
    ema_decay: float = 0.0


class RunsState(NamedTuple):
    """What training changes; every array [r, ...]."""

    params: PyTree
    optimizer: PyTree
    ema: PyTree | None  # moving average of the parameters, None unless ema_decay > 0

    @property
    def measured(self) -> PyTree:
        """The parameters that validation and tests are about."""
        return self.params if self.ema is None else self.ema


class Kept(NamedTuple):
    """What a run had when its validation was best."""

    params: PyTree  # [r, ...]
    accuracy: jax.Array  # float32 [r]


class BlockMetrics(NamedTuple):
    """Means over the steps of a block; float32 [r]."""

    loss: jax.Array
    accuracy: jax.Array
    skipped: jax.Array  # share of the steps


@functools.partial(jax.jit, static_argnums=0)
def init_runs(recipe: Recipe, seeds: jax.Array) -> RunsState:
    """Initialises runs from their seeds, int32 [r]."""
    model = LanguageModel(recipe.model)
    optimizer = make_optimizer(recipe.optimizer)

    def init(seed: jax.Array) -> RunsState:
        params = model.init(stream(seed, INITIALISATION), jnp.zeros((1, 2), jnp.int32))["params"]
        return RunsState(params, optimizer.init(params), jax.tree.map(jnp.copy, params) if recipe.ema_decay else None)

    return jax.vmap(init)(seeds)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_block(
    recipe: Recipe,
    state: RunsState,
    learning_rates: jax.Array,
    data_of_run: jax.Array,
    first_step: jax.Array,
    kind_and_place: jax.Array,
    questions: Sequence[Questions],
) -> tuple[RunsState, BlockMetrics]:
    """Takes a step of all runs for every batch.

    Args:
      recipe: what the runs share.
      state: before the block; donated.
      learning_rates: their peaks, float32 [r].
      data_of_run: int32 [r], which of the s batches of a step a run sees.
      first_step: [] int32, steps taken before.
      kind_and_place: int32 [n, 2], which of the questions a step takes, and which of their batches.
      questions: of every kind, which are those whose arrays have different shapes, [batches, s, b, ...].

    Returns:
      The state after the block, and means over its steps.
    """

    def step(state: RunsState, inputs: tuple[jax.Array, jax.Array]) -> tuple[RunsState, BlockMetrics]:
        number, (kind, place) = inputs
        one_run = over_runs(functools.partial(_step, recipe, number), recipe.runs_at_once)

        def train_on(of_kind: Questions, state: RunsState) -> tuple[RunsState, BlockMetrics]:
            return one_run(state, learning_rates, jax.tree.map(lambda v: v[place][data_of_run], of_kind))

        return jax.lax.switch(kind, [functools.partial(train_on, of_kind) for of_kind in questions], state)

    numbers = first_step + 1 + jnp.arange(kind_and_place.shape[0])
    state, metrics = jax.lax.scan(step, state, (numbers, kind_and_place))
    return state, jax.tree.map(lambda v: v.mean(axis=0), metrics)


@functools.partial(jax.jit, donate_argnums=0)
def keep_better(kept: Kept, params: PyTree, accuracy: jax.Array) -> Kept:
    """Takes the parameters of the runs, [r, ...], whose accuracy, [r], is not worse than that of what is kept."""
    better = accuracy >= kept.accuracy

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, Kept(params, accuracy), kept)


def over_runs(function: Callable[..., PyTree], at_once: int) -> Callable[..., PyTree]:
    """Maps a function over the runs, the first axis of its arguments, `at_once` of them together; 0 = all."""
    if not at_once:
        return jax.vmap(function)
    return lambda *arguments: jax.lax.map(lambda of_run: function(*of_run), arguments, batch_size=at_once)


def cross_entropy(logits: jax.Array, targets: jax.Array, smoothing: float) -> jax.Array:
    """Cross-entropy of every row with smoothed labels.

    Args:
      logits: [..., V].
      targets: int [...].
      smoothing: the share of the probability that all V tokens have alike; the target has the rest.

    Returns:
      [...], nats.
    """
    of_target = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if not smoothing:
        return of_target
    of_any = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    return (1 - smoothing) * of_target + smoothing * of_any


def _step(
    recipe: Recipe, number: jax.Array, state: RunsState, learning_rate: jax.Array, batch: Questions
) -> tuple[RunsState, BlockMetrics]:
    """One step of one run."""

    def loss_and_accuracy(params: PyTree) -> tuple[jax.Array, jax.Array]:
        logits = _answers(recipe.model, params, batch)
        weights = batch.real / jnp.sum(batch.real)
        losses = cross_entropy(logits, batch.targets, recipe.label_smoothing)
        return jnp.sum(weights * losses), jnp.sum(weights * (jnp.argmax(logits, axis=-1) == batch.targets))

    (loss, accuracy), grads = jax.value_and_grad(loss_and_accuracy, has_aux=True)(state.params)
    updates, moments = make_optimizer(recipe.optimizer).update(grads, state.optimizer, state.params)
    peak = dataclasses.replace(recipe.optimizer, learning_rate=learning_rate)
    rate = make_schedule(peak, recipe.steps)(number)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    ema = state.ema if state.ema is None else optax.incremental_update(params, state.ema, 1 - recipe.ema_decay)
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    state = jax.tree.map(functools.partial(jnp.where, finite), RunsState(params, moments, ema), state)
    return state, BlockMetrics(loss, accuracy, 1.0 - finite)


@functools.partial(jax.jit, static_argnums=(0, 3))
def count_correct(
    model: ModelConfig, params: PyTree, questions: Questions, runs_at_once: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Counts right answers of every run on the same sequences.

    Args:
      model: of the runs.
      params: [r, ...].
      questions: [n, b, ...], n batches one after another.
      runs_at_once: so many are computed together; 0 = all.

    Returns:
      float32 [r], right answers, and [], all answers.
    """

    def batch_of_run(batch: Questions, params: PyTree) -> jax.Array:
        right = jnp.argmax(_answers(model, params, batch), axis=-1) == batch.targets
        return jnp.sum(right & batch.real, dtype=jnp.float32)

    def of_runs(batch: Questions) -> jax.Array:
        return over_runs(functools.partial(batch_of_run, batch), runs_at_once)(params)

    counts = jax.lax.map(of_runs, questions)
    return counts.sum(axis=0), jnp.sum(questions.real, dtype=jnp.float32)


def _answers(model: ModelConfig, params: PyTree, batch: Questions) -> jax.Array:
    """Logits [b, k, V] at the supervised positions."""
    module = LanguageModel(_with_chunks(model, batch.tokens.shape[-1]))
    hidden = module.apply({"params": params}, batch.tokens, batch.documents, method="hidden")
    asked = jnp.take_along_axis(hidden, batch.positions[..., None], axis=1)
    return module.apply({"params": params}, asked, method="logits")


def _with_chunks(model: ModelConfig, width: int) -> ModelConfig:
    """Chunks of equal size that fill the width, unless the config has a size of its own or kernels choose theirs."""
    here = "xla" if no_triton_here() or partitioned() else "triton"
    implementation = model.scan_implementation or here
    in_jax = implementation == "xla"
    own_choice = not in_jax and (implementation != "triton" or model.mixers != "gated_deltanet")
    if model.chunk_size is not None or own_choice:
        return model
    rows = _CHUNK_ROWS if in_jax else _TRITON_CHUNK_ROWS
    positions = max(1, rows // (model.mimo_rank if model.mixers == "mamba3" else 1))
    return dataclasses.replace(model, chunk_size=-(-width // -(-width // positions)))
