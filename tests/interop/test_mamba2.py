"""Released Mamba-2 models: a synthetic checkpoint against loops over tokens that read its tensors themselves."""

import json

import jax
import numpy as np
from safetensors.numpy import save_file

from m3jax.interop import mamba_ssm
from m3jax.models.language_model import LanguageModel
from m3jax.models.norm import EPSILON
from tests import tolerances
from tests.models.test_mamba2 import naive

_D, _LAYERS, _VOCAB, _ROWS, _HEADDIM, _STATE, _LENGTH = 8, 2, 21, 32, 4, 12, 11
_INNER = 2 * _D
_HEADS, _CHANNELS = _INNER // _HEADDIM, _INNER + 2 * _STATE


def _released(rng: np.random.Generator) -> dict[str, np.ndarray]:
    layer = {
        "norm.weight": (_D,),
        "mixer.in_proj.weight": (_INNER + _CHANNELS + _HEADS, _D),
        "mixer.conv1d.weight": (_CHANNELS, 1, 4),
        "mixer.conv1d.bias": (_CHANNELS,),
        "mixer.dt_bias": (_HEADS,),
        "mixer.A_log": (_HEADS,),
        "mixer.D": (_HEADS,),
        "mixer.norm.weight": (_INNER,),
        "mixer.out_proj.weight": (_D, _INNER),
    }
    shapes = {f"backbone.layers.{i}.{name}": shape for i in range(_LAYERS) for name, shape in layer.items()}
    shapes |= {"backbone.embedding.weight": (_ROWS, _D), "backbone.norm_f.weight": (_D,)}
    tensors = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return tensors | {"lm_head.weight": tensors["backbone.embedding.weight"]}


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON) * weight


def _logits(released: dict[str, np.ndarray], tokens: np.ndarray, config) -> np.ndarray:
    x = released["backbone.embedding.weight"][tokens]
    for i in range(_LAYERS):
        t = {name.removeprefix(f"backbone.layers.{i}."): tensor for name, tensor in released.items()}
        mixer = {
            "in_proj": {"kernel": t["mixer.in_proj.weight"].T},
            "conv": {"conv_kernel": t["mixer.conv1d.weight"][:, 0].T, "conv_bias": t["mixer.conv1d.bias"]},
            "dt_bias": t["mixer.dt_bias"],
            "a_log": t["mixer.A_log"],
            "d": t["mixer.D"],
            "norm": {"scale": t["mixer.norm.weight"]},
            "out_proj": {"kernel": t["mixer.out_proj.weight"].T},
        }
        out, *_ = naive(mixer, _norm(x, t["norm.weight"]), np.zeros(tokens.shape), config)
        x = x + out
    return _norm(x, released["backbone.norm_f.weight"]) @ released["backbone.embedding.weight"].T


def test_synthetic_checkpoint(tmp_path, x64):
    rng = np.random.default_rng(0)
    released = _released(rng)
    save_file(released, tmp_path / "model.safetensors")
    config = {
        "d_model": _D, "d_intermediate": 0, "n_layer": _LAYERS, "vocab_size": _VOCAB,
        "ssm_cfg": {"layer": "Mamba2", "d_state": _STATE, "headdim": _HEADDIM},
        "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 16, "tie_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, params = mamba_ssm.load(tmp_path)
    tokens = rng.integers(_VOCAB, size=(2, _LENGTH))
    logits = jax.jit(LanguageModel(model.model).apply)({"params": params}, tokens)
    terms = _LAYERS * (2 * _D + 4 + _STATE * _LENGTH)  # projections, taps, and states summed along the sequence
    expected = _logits(released, tokens, model.model)
    tolerances.assert_close(logits, expected, tolerances.rounding("float64", terms), "logits")
