"""One optimizer step, jitted and donated: microbatches, gradients, AdamW, and no update from a non-finite value.

The gradient of a step is that of the mean loss over all real tokens of its batch: every token has the same weight, in
whichever microbatch it falls, so `grad_accumulation` changes memory and rounding only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from m3jax.config import Config
from m3jax.models.language_model import LanguageModel
from m3jax.models.own_rows import SEQUENCE_AXIS
from m3jax.training.loss import linear_cross_entropy
from m3jax.training.optimizer import make_optimizer
from m3jax.training.schedule import make_schedule
from m3jax.training.sharding import BATCH_AXES, batch_sharding, state_shardings

PyTree = Any
Batch = dict[str, jax.Array]
LossFunction = Callable[[PyTree, Batch], jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything a step changes."""

    step: jax.Array  # [] int32, the steps taken, skipped ones included
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None  # moving average of the parameters, None unless train.ema_decay > 0


def init_params(config: Config, model: LanguageModel) -> PyTree:
    """Initialises the parameters from `train.seed`. Pure: jit it or eval_shape it."""
    return model.init(jax.random.key(config.train.seed), jnp.zeros((1, 2), jnp.int32))["params"]


def init_state(config: Config, model: LanguageModel) -> TrainState:
    """Initialises everything a step changes. Pure, like `init_params`."""
    return first_state(config, init_params(config, model))


def first_state(config: Config, params: PyTree) -> TrainState:
    """Everything a step changes, before the first step with these parameters. Pure."""
    # Moments and average of at least float32, whatever type the parameters have: small changes would be rounded away.
    wide = jax.tree.map(_at_least_float32, params)
    opt_state = make_optimizer(config.optimizer).init(wide)
    ema = jax.tree.map(jnp.copy, wide) if config.train.ema_decay > 0 else None
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)


def make_train_step(config: Config, model: LanguageModel, mesh: Mesh) -> Callable:
    """Builds the jitted `train_step(state, batch, proceed) -> (state, metrics)`; `state` is donated.

    `proceed` [] bool gates the update. A non-finite loss or gradient leaves parameters, optimizer and average as they
    were. metrics are float32 scalars on the device: loss, grad_norm, learning_rate, tokens (real targets);
    `finite` [] bool; and `proceed` [] bool for the next call: unless train.nonfinite is skip, nothing is updated after
    a non-finite step until the host, which reads metrics one step late, has decided. The step counter then stands
    still too, so that the state is the one before the bad step.
    """
    optimizer = make_optimizer(config.optimizer)
    schedule = make_schedule(config.optimizer, config.train.steps)
    loss_fn = make_loss(config, model, mesh)
    skip = config.train.nonfinite == "skip"
    decay = config.train.ema_decay

    def train_step(state: TrainState, batch: Batch, proceed: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        tokens = batch["weights"].sum()
        batch = batch | {"weights": batch["weights"] / jnp.maximum(tokens, 1)}
        loss, grads = _accumulate(jax.value_and_grad(loss_fn), state.params, batch, config.train.grad_accumulation)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        learning_rate = jnp.asarray(schedule(state.step + 1), jnp.float32)
        params = jax.tree.map(lambda p, u: (p - learning_rate * u).astype(p.dtype), state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: (decay * e + (1 - decay) * p).astype(e.dtype), ema, params)

        # From finite moments and clipped finite gradients AdamW makes finite updates: they need no pass of their own.
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        apply = finite & proceed
        counted = jnp.asarray(True) if skip else apply
        old = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(partial(jnp.where, apply), (params, opt_state, ema), old)
        state = TrainState(state.step + counted.astype(jnp.int32), params, opt_state, ema)
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "tokens": tokens}
        return state, metrics | {"finite": finite, "proceed": counted}

    shardings = state_shardings(jax.eval_shape(lambda: init_state(config, model)), mesh)
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh), replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def make_loss(config: Config, model: LanguageModel, mesh: Mesh) -> LossFunction:
    """Builds `loss(params, batch)`: the sum over tokens of weight times -log p(target), float32 [].

    Each device reduces its own tokens, `train.loss_chunk` tokens at a time, so that the head's gradient crosses devices
    once and not once per chunk.
    """

    def local_sum(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return linear_cross_entropy(hidden, embedding, targets, weights, chunk=config.train.loss_chunk)[None]

    pieces = P(BATCH_AXES, SEQUENCE_AXIS)
    sums = P((*BATCH_AXES, SEQUENCE_AXIS))
    # The loss carries sums over the rows through a scan from constant zeros, which the check takes for replicated.
    given = pieces, P(), pieces, pieces
    local_sums = jax.shard_map(local_sum, mesh=mesh, in_specs=given, out_specs=sums, check_vma=False)

    def loss(params: PyTree, batch: Batch) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            hidden = model.apply({"params": params}, batch["tokens"], batch["segment_ids"], method="hidden")
        head = params["embedding" if config.model.tie_embeddings else "head"]
        head = _at_least_float32(head)  # so that its gradient is summed over devices in that type
        return local_sums(hidden, head, batch["targets"], batch["weights"]).sum()

    return loss


def make_eval_step(config: Config, model: LanguageModel, mesh: Mesh) -> Callable:
    """Builds the jitted `eval_step(params, batch) -> (sum of -log p over the real targets, their number)`."""
    loss_fn = make_loss(config, model, mesh)

    def eval_step(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        microbatches = _split(batch, config.train.grad_accumulation)
        nll = jax.lax.map(lambda microbatch: loss_fn(params, microbatch), microbatches)
        return nll.sum(), batch["weights"].sum()

    return jax.jit(eval_step)


def _accumulate(value_and_grad: Callable, params: PyTree, batch: Batch, count: int) -> tuple[jax.Array, PyTree]:
    """Sums loss and gradients over `count` microbatches, in at least float32."""
    if count == 1:
        loss, grads = value_and_grad(params, batch)
        return loss, jax.tree.map(_at_least_float32, grads)

    def add(sums: PyTree, microbatch: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums,
                            value_and_grad(params, microbatch)), None  # fmt: skip

    zeros = jax.tree.map(lambda p: jnp.zeros_like(_at_least_float32(p)), params)
    return jax.lax.scan(add, (jnp.zeros((), jnp.float32), zeros), _split(batch, count))[0]


def _split(batch: Batch, count: int) -> Batch:
    """Splits [b, l] into [count, b / count, l]; each device keeps its own rows, which lie together in b."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
