"""The mixers that a layer can have, by the name they have in `config.model.mixers`.

A mixer is a module of the model's config, called with

  u: [b, l, d_model], or [b, d_model] for one decode step, which may be `Normed`;
  segment_ids: [b, l] or None; documents do not see each other. Not used by a step;
  state: what precedes the first token, whose document it continues; None = nothing, and no state is returned;
  residual: of u's shape, or None,

that returns (output of u's shape, added to the residual or, of a step, maybe about to be (`Sums`), the state after the
last token or None).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from m3jax.config import ModelConfig
from m3jax.models import attention, gated_deltanet, mamba2, mamba3

State = Any  # a tree of arrays, each with the batch as its first axis


class Mixer(NamedTuple):
    """A kind of mixer."""

    module: Callable[..., nn.Module]
    initial_state: Callable[[ModelConfig, int, int], State]  # (config, batch, capacity), see LanguageModel


MIXERS = {
    "attention": Mixer(attention.Attention, attention.initial_state),
    "gated_deltanet": Mixer(gated_deltanet.GatedDeltaNet, gated_deltanet.initial_state),
    "mamba2": Mixer(mamba2.Mamba2Mixer, mamba2.initial_state),
    "mamba3": Mixer(mamba3.Mamba3Mixer, mamba3.initial_state),
}
