"""config.json of the released layout (state-spaces/mamba) and the `ModelConfig` that says the same."""

from typing import Any

from m3jax.config import ModelConfig
from m3jax.errors import CheckpointError, ConfigError

_LAYERS = {"Mamba2": "mamba2", "Mamba3": "mamba3"}
# Released key → ours; those that are left out have our defaults, which are the released classes'.
_MODEL_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_layer": "n_layers",
    "pad_vocab_size_multiple": "pad_vocab_multiple",
    "tie_embeddings": "tie_embeddings",
}
_REQUIRED = ("vocab_size", "d_model", "n_layer")
_COMMON_KEYS = {key: key for key in ("d_state", "expand", "headdim", "ngroups", "dt_min", "dt_max", "dt_init_floor")}
_MIXER_KEYS = {
    "mamba2": _COMMON_KEYS | {"d_conv": "d_conv"},
    "mamba3": _COMMON_KEYS
    | {
        "rope_fraction": "rope_fraction",
        "A_floor": "a_floor",
        "is_outproj_norm": "outproj_norm",
        "a_activation": "a_activation",  # ours alone
    },
}
# What the released classes can do otherwise and the models here cannot.
_ONLY_MIXER = {
    "mamba2": {
        "ngroups": 1,  # the norm after the gate is over each group there, over all channels here
        "d_ssm": None,
        "D_has_hdim": False,
        "rmsnorm": True,
        "norm_before_gate": False,
        "dt_limit": [0.0, float("inf")],
        "bias": False,
        "conv_bias": True,
    },
    "mamba3": {},
}
# Attention: what must be said to be so, because the released class has another default; and what has this default.
_ATTENTION_SAYS = {"causal": True, "qkv_proj_bias": False, "out_proj_bias": False}
_ATTENTION_DEFAULTS = {"mlp_dim": 0, "d_conv": 0, "softmax_scale": None, "rotary_emb_interleaved": False}
# And the other way round.
_ONLY_OURS = {"mamba2": {"ngroups": 1}, "mamba3": {"rotation": "data", "fixed_lambda": None, "bc_bias": True}}


def from_released(released: Any) -> dict[str, Any]:
    """The keys of a `ModelConfig` that a config.json decides, not yet checked.

    Raises:
      CheckpointError: a field is missing, or lists those that say something that models here cannot do.
    """
    if not isinstance(released, dict):
        raise CheckpointError(f"config.json holds a {type(released).__name__}, expected fields and values.")
    missing = [key for key in _REQUIRED if key not in released]
    if missing:
        raise CheckpointError(f"config.json has no field {', '.join(map(repr, missing))}.")
    for key in _REQUIRED:
        if type(released[key]) is not int or released[key] < 1:
            raise CheckpointError(f"config.json has {key} = {released[key]!r}, expected an integer of at least 1.")
    mixer, n_layers = released.get("ssm_cfg") or {}, released["n_layer"]
    attention_layers = set(released.get("attn_layer_idx") or ())
    layer = mixer.get("layer", "Mamba1")
    kind = _LAYERS.get(layer)
    problems = [] if kind else [f"ssm_cfg.layer = {layer!r}, expected {' or '.join(_LAYERS)}"]
    if not attention_layers <= set(range(n_layers)):
        problems.append(f"attn_layer_idx = {released['attn_layer_idx']}, expected layers in [0, {n_layers})")
    attention, more = _attention_from_released(released) if attention_layers else ({}, [])
    problems += more
    if not released.get("rms_norm", True):
        problems.append("rms_norm = False, expected True")
    problems += [
        f"ssm_cfg.{key} = {mixer[key]!r}, expected {value!r}"
        for key, value in _ONLY_MIXER.get(kind, {}).items()
        if mixer.get(key, value) != value
    ]
    if problems:
        raise CheckpointError("config.json has what models here cannot do: " + "; ".join(problems) + ".")
    model = {ours: released[key] for key, ours in _MODEL_KEYS.items() if key in released}
    model |= {ours: mixer[key] for key, ours in _MIXER_KEYS[kind].items() if key in mixer}
    kinds = ["attention" if i in attention_layers else kind for i in range(n_layers)]
    model |= {"mixers": ",".join(_period(kinds)), "d_intermediate": released.get("d_intermediate", 0)} | attention
    if kind == "mamba3" and mixer.get("is_mimo", False):
        model["mimo_rank"] = mixer.get("mimo_rank", 4)
    return model


def to_released(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
      ConfigError: names the key that the released code has no counterpart of.
    """
    kinds = sorted(set(config.mixer_pattern) - {"attention"})
    if len(kinds) != 1 or kinds[0] not in _MIXER_KEYS:
        raise ConfigError(
            f"config.model.mixers = {config.mixers!r}: the released layout holds models whose mixers are mamba2 or "
            "mamba3, all alike but for layers of attention."
        )
    kind = kinds[0]
    attention_layers = [
        i for i in range(config.n_layers) if config.mixer_pattern[i % len(config.mixer_pattern)] == "attention"
    ]
    for key, value in _ONLY_OURS[kind].items():
        if getattr(config, key) != value:
            raise ConfigError(
                f"config.model.{key} = {getattr(config, key)!r}: the released code has only {key} = {value!r}"
                f"{' for mamba2' if kind == 'mamba2' else ''}; such a model cannot be written in its layout."
            )
    if kind == "mamba3" and not config.n_angles:
        raise ConfigError(
            f"config.model.rope_fraction = {config.rope_fraction}: the released code has only 0.5 and 1, and at least "
            "one angle; such a model cannot be written in its layout."
        )
    mixer = {"layer": next(layer for layer, name in _LAYERS.items() if name == kind)}
    mixer |= {key: getattr(config, ours) for key, ours in _MIXER_KEYS[kind].items()}
    if kind == "mamba3":
        mimo = config.mimo_rank > 1
        mixer |= {"is_mimo": mimo} | ({"mimo_rank": config.mimo_rank} if mimo else {})
        mixer["chunk_size"] = max(64 // config.mimo_rank, 1)  # the released README's rule
        # Released files do not say which activation they have. The released class ignores keys that it does not know;
        # one that says what its present version does anyway is left out.
        if config.a_activation == "heavy_tail":
            del mixer["a_activation"]
    return {key: getattr(config, ours) for key, ours in _MODEL_KEYS.items()} | {
        "d_intermediate": config.d_intermediate,
        "ssm_cfg": mixer,
        "attn_layer_idx": attention_layers,
        "attn_cfg": _attention_to_released(config) if attention_layers else {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
    }


def _attention_from_released(released: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our keys that attn_cfg decides, and what it says that models here cannot do."""
    said = released.get("attn_cfg") or {}
    heads = said.get("num_heads")
    if not isinstance(heads, int) or heads < 1:
        return {}, [f"attn_cfg.num_heads = {heads!r}, expected how many heads the layers of attention have"]
    width = said.get("head_dim") or released["d_model"] // heads
    problems = [
        f"attn_cfg.{key} = {said[key]!r}, expected {value!r}" if key in said else f"no attn_cfg.{key}, expected {value}"
        for key, value in _ATTENTION_SAYS.items()
        if said.get(key) is not value
    ]
    problems += [
        f"attn_cfg.{key} = {said[key]!r}, expected {value!r}"
        for key, value in _ATTENTION_DEFAULTS.items()
        if said.get(key, value) != value
    ]
    turned = said.get("rotary_emb_dim", 0)
    if turned not in (0, width):
        problems.append(f"attn_cfg.rotary_emb_dim = {turned}, expected 0 or the whole head, {width}")
    keys = {"attention_heads": heads, "attention_headdim": width}
    keys["rope_theta"] = float(said.get("rotary_emb_base", 10_000.0)) if turned else 0.0
    return keys | {"attention_kv_heads": said.get("num_heads_kv")}, problems


def _attention_to_released(config: ModelConfig) -> dict[str, Any]:
    rotary = {"rotary_emb_dim": config.attention_headdim if config.rope_theta else 0}
    if config.rope_theta:
        rotary["rotary_emb_base"] = config.rope_theta
    heads = {"num_heads": config.attention_heads, "head_dim": config.attention_headdim}
    if config.attention_kv_heads is not None:
        heads["num_heads_kv"] = config.attention_kv_heads
    return heads | _ATTENTION_SAYS | {"d_conv": 0} | rotary


def _period(kinds: list[Any]) -> list[Any]:
    """The shortest start of a list that repeats to its end."""
    n = len(kinds)
    return next(kinds[:k] for k in range(1, n + 1) if n % k == 0 and kinds == kinds[:k] * (n // k))
