"""Held-out loss, perplexity and bits per byte."""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from m3jax.data import HeldOut
from m3jax.training.sharding import shard_batch

PyTree = Any


@dataclass(frozen=True)
class Evaluation:
    """The result on held-out data.

    Attributes:
      loss: nats per token.
      perplexity: exp(loss).
      tokens: how many were predicted.
      bytes: of UTF-8 text that these tokens stand for, by the mean over all held-out text; None = not known.
      bits_per_byte: so that models with different tokenizers compare; None = not known.
    """

    loss: float
    perplexity: float
    tokens: int
    bytes: int | None
    bits_per_byte: float | None

    def record(self, prefix: str = "validation") -> dict[str, float]:
        """Returns the numbers as a metrics record."""
        return {f"{prefix}_{name}": value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f}, perplexity {self.perplexity:.3f}"
        if self.bits_per_byte is not None:
            text += f", {self.bits_per_byte:.4f} bits per byte"
        return f"{text} ({self.tokens:,} tokens)"


def evaluate(eval_step: Callable, params: PyTree, validation: HeldOut, limit: int, mesh: Mesh) -> Evaluation:
    """Measures parameters on held-out data.

    Args:
      eval_step: from make_eval_step.
      params: as it takes them.
      validation: from open_validation; every process reads all of it and keeps its own rows.
      limit: how many batches; 0 = all.
      mesh: from make_mesh.

    """
    batches = ({name: _own_rows(rows) for name, rows in batch.items()} for batch in validation.batches(limit or None))
    started = itertools.chain((eval_step(params, shard_batch(batch, mesh)) for batch in batches), [None])
    # Read once the next one is started, not later: simulated devices wait for one another forever where many are.
    sums = [jax.device_get(result) for result, _ in itertools.pairwise(started)]
    nll, tokens = (math.fsum(map(float, values)) for values in zip(*sums, strict=True))
    loss = nll / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    if validation.n_bytes is None:
        return Evaluation(loss, perplexity, round(tokens), None, None)
    covered = tokens / validation.n_tokens * validation.n_bytes
    return Evaluation(loss, perplexity, round(tokens), round(covered), nll / math.log(2) / covered)


def _own_rows(rows: np.ndarray) -> np.ndarray:
    share = len(rows) // jax.process_count()
    return rows[jax.process_index() * share :][:share]
