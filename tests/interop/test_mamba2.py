"""Released Mamba-2 models, and hybrids: synthetic checkpoints against numpy that reads their tensors themselves."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from m3jax.interop import mamba_ssm
from m3jax.models.language_model import LanguageModel
from m3jax.models.norm import EPSILON
from tests import tolerances
from tests.models.test_mamba2 import naive

_D, _LAYERS, _VOCAB, _ROWS, _HEADDIM, _STATE, _LENGTH = 8, 2, 21, 32, 4, 12, 11
_INNER = 2 * _D
_HEADS, _CHANNELS = _INNER // _HEADDIM, _INNER + 2 * _STATE
_ATTENTION = {"causal": True, "qkv_proj_bias": False, "out_proj_bias": False, "num_heads": 4, "num_heads_kv": 2}
_ATTENTION |= {"head_dim": 6}


def _released(rng: np.random.Generator, attention_layers: list[int]) -> dict[str, np.ndarray]:
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
    attention = {"norm.weight": (_D,), "mixer.in_proj.weight": ((4 + 2 * 2) * 6, _D), "mixer.out_proj.weight": (_D, 24)}
    layers = [attention if i in attention_layers else layer for i in range(_LAYERS)]
    shapes = {f"backbone.layers.{i}.{name}": shape for i in range(_LAYERS) for name, shape in layers[i].items()}
    shapes |= {"backbone.embedding.weight": (_ROWS, _D), "backbone.norm_f.weight": (_D,)}
    tensors = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return tensors | {"lm_head.weight": tensors["backbone.embedding.weight"]}


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON) * weight


def _attention(t: dict[str, np.ndarray], u: np.ndarray, theta: float) -> np.ndarray:
    """As mamba_ssm/modules/mha.py: q, then k and v; rotation of the pairs (i, d/2 + i)."""
    qkv = u @ t["mixer.in_proj.weight"].T
    q = qkv[..., : 4 * 6].reshape(*u.shape[:2], 4, 6)
    k, v = np.moveaxis(qkv[..., 4 * 6 :].reshape(*u.shape[:2], 2, 2, 6), 2, 0)
    if theta:
        angle = np.arange(u.shape[1])[:, None, None] * theta ** (-np.arange(0, 6, 2) / 6)
        q, k = (
            np.concatenate([x[..., :3] * np.cos(angle) - x[..., 3:] * np.sin(angle),
                            x[..., :3] * np.sin(angle) + x[..., 3:] * np.cos(angle)], axis=-1)
            for x in (q, k)
        )  # fmt: skip
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(6)
    weights = np.where(np.tri(u.shape[1], dtype=bool), np.exp(scores - scores.max()), 0)
    out = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)
    return out.reshape(*u.shape[:2], 24) @ t["mixer.out_proj.weight"].T


def _logits(released: dict[str, np.ndarray], tokens: np.ndarray, config) -> np.ndarray:
    x = released["backbone.embedding.weight"][tokens]
    for i in range(_LAYERS):
        t = {name.removeprefix(f"backbone.layers.{i}."): tensor for name, tensor in released.items()}
        if "mixer.dt_bias" not in t:
            x = x + _attention(t, _norm(x, t["norm.weight"]), config.rope_theta)
            continue
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


@pytest.mark.parametrize(
    ("attention_layers", "rotary", "mixers"),
    [
        ([], {}, "mamba2"),
        ([1], {}, "mamba2,attention"),
        ([0], {"rotary_emb_dim": 6, "rotary_emb_base": 100}, "attention,mamba2"),
    ],
)
def test_synthetic_checkpoint(tmp_path, x64, attention_layers, rotary, mixers):
    rng = np.random.default_rng(0)
    released = _released(rng, attention_layers)
    save_file(released, tmp_path / "model.safetensors")
    config = {
        "d_model": _D, "d_intermediate": 0, "n_layer": _LAYERS, "vocab_size": _VOCAB,
        "ssm_cfg": {"layer": "Mamba2", "d_state": _STATE, "headdim": _HEADDIM},
        "attn_layer_idx": attention_layers, "attn_cfg": _ATTENTION | rotary if attention_layers else {},
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 16, "tie_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, params = mamba_ssm.load(tmp_path)
    assert model.model.mixers == mixers
    tokens = rng.integers(_VOCAB, size=(2, _LENGTH))
    logits = jax.jit(LanguageModel(model.model).apply)({"params": params}, tokens)
    terms = _LAYERS * (2 * _D + 4 + _STATE * _LENGTH)  # projections, taps, and states summed along the sequence
    expected = _logits(released, tokens, model.model)
    tolerances.assert_close(logits, expected, tolerances.rounding("float64", terms), "logits")
