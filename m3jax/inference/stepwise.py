"""Held-out loss by decode steps: what a model knows when it runs as it generates, its state rounded at every token."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from m3jax.inference.cache import clear_rows
from m3jax.inference.sampling import log_probability


def make_stepwise_eval(model: nn.Module) -> Callable:
    """Builds the jitted `eval_step(params, batch) -> (sum of -log p over the real targets, their number)`.

    As `training.step.make_eval_step`, but token by token through `model.step`, on one device.
    """

    def eval_step(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        params = model.separate_layers(params)
        documents = batch["segment_ids"]
        starts = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)))

        def advance(state: Any, inputs: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
            token, target, weight, starts = inputs
            logits, state = model.apply({"params": params}, token, clear_rows(state, starts), method="step")
            return state, -(weight * log_probability(logits, target)).sum()

        columns = jax.tree.map(jnp.transpose, (batch["tokens"], batch["targets"], batch["weights"], starts))
        _, nll = jax.lax.scan(advance, model.initial_state(*documents.shape), columns)
        return nll.sum(), batch["weights"].sum()

    return jax.jit(eval_step)
