"""The models that studies compare, by name: what each changes in the `ModelConfig` that all have in common."""

import dataclasses

import jax

from m3jax.config import ModelConfig, build_config, require
from m3jax.models.language_model import LanguageModel

MODELS: dict[str, dict[str, object]] = {
    "mamba3_siso": {"mixers": "mamba3"},
    "mamba3_mimo": {"mixers": "mamba3", "mimo_rank": 4},
    "mamba3_standard_rope": {"mixers": "mamba3", "rotation": "standard"},  # angles depend on the position alone
    "mamba3_no_rope": {"mixers": "mamba3", "rope_fraction": 0.0},
    "mamba2": {"mixers": "mamba2"},
    "gdn": {"mixers": "gated_deltanet"},
    "gdn_negative": {"mixers": "gated_deltanet", "gdn_negative_eigenvalues": True},
    "hybrid": {"mixers": "mamba3,attention"},
    "transformer": {"mixers": "attention"},
}


def model_config(label: str, shared: ModelConfig, d_model: int, n_layers: int, vocab_size: int) -> ModelConfig:
    """Makes a model of a study.

    All have heads of the same number and width, shared.headdim; a head's state is shared.headdim x shared.d_state,
    in the gated delta rule too.

    Args:
      label: a key of MODELS, or one with @N for a state of the width N instead of shared.d_state.
      shared: what all models have in common.
      d_model: the width.
      n_layers: number of layers.
      vocab_size: number of tokens.

    Raises:
      ConfigError: sizes that do not fit, or a key that ModelConfig does not have.
    """
    name, at, d_state = label.partition("@")
    own = MODELS[name]
    if at:
        shared = dataclasses.replace(shared, d_state=int(d_state))
    heads = shared.expand * d_model // shared.headdim
    sizes = {"d_model": d_model, "n_layers": n_layers, "vocab_size": vocab_size}
    if "attention" in own["mixers"]:
        sizes |= {"attention_heads": heads, "attention_headdim": shared.headdim}
    elif own["mixers"] == "gated_deltanet":
        expected = f"a multiple of model.d_state, {shared.d_state}, as {label}'s values are n times as wide as keys"
        require(shared.headdim % shared.d_state == 0, "model.headdim", shared.headdim, expected)
        sizes |= {"gdn_heads": heads, "gdn_headdim": shared.d_state, "gdn_expand_v": shared.headdim // shared.d_state}
    return build_config({"model": dataclasses.asdict(shared) | sizes | own}).model


def state_bytes(model: ModelConfig, positions: int) -> int:
    """Bytes that decoding keeps of one sequence, in all layers; in attention, after so many positions."""
    state = jax.eval_shape(lambda: LanguageModel(model).initial_state(1, positions))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
