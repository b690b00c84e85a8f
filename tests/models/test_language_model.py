"""Structure, initialisation, precision and recomputation of the language model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import ModelConfig
from m3jax.models.language_model import LanguageModel
from tests import tolerances

TINY = ModelConfig(
    vocab_size=61, d_model=16, n_layers=2, d_intermediate=24, headdim=8, d_state=8, mimo_rank=2, dtype="float32"
)
TOKENS = np.random.default_rng(0).integers(0, 61, size=(2, 19))


def _init(config: ModelConfig):
    model = LanguageModel(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.asarray(TOKENS))["params"]


@pytest.fixture(scope="module")
def tiny():
    return _init(TINY)


def test_remat_and_loop_over_layers_change_no_gradient(tiny):
    _, params = tiny

    @functools.partial(jax.jit, static_argnums=(1, 2))
    @jax.grad
    def gradient(params, remat, scan_layers):
        model = LanguageModel(dataclasses.replace(TINY, remat=remat, scan_layers=scan_layers))
        return jnp.sum(jax.nn.log_softmax(model.apply({"params": params}, TOKENS))[..., 0])

    expected, tolerance = gradient(params, "none", True), tolerances.rounding("float32", TINY.d_inner)
    for remat, scan_layers in (("dots", True), ("full", True), ("none", False), ("full", False)):
        compare = functools.partial(tolerances.assert_close, tolerance=tolerance, name=f"{remat}, {scan_layers}")
        jax.tree.map(compare, gradient(params, remat, scan_layers), expected)


def test_packed_documents_do_not_see_each_other(tiny):
    model, params = tiny
    ids = jnp.asarray(np.repeat([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]], 2, axis=0))
    apply = jax.jit(model.apply)
    packed = apply({"params": params}, TOKENS, ids)
    alone = apply({"params": params}, TOKENS[:, 4:7])
    tolerances.assert_close(packed[:, 4:7], alone, tolerances.rounding("float32", TINY.d_inner), "logits")


def test_causal_through_gradients(tiny):
    model, params = tiny

    def log_prob_at_nine(embedding_shift):
        shifted = model.bind({"params": params})
        x, _ = shifted.layers(shifted._embed(TOKENS) + embedding_shift, None, None)
        return shifted.logits(shifted.norm(x))[:, 9].sum()

    gradient = np.asarray(jax.jit(jax.grad(log_prob_at_nine))(jnp.zeros((2, 19, 16))))
    assert not gradient[:, 10:].any() and gradient[:, :10].any(axis=-1).all()


@pytest.mark.parametrize(("dtype", "state_dtype"), [("float32", "float32"), ("bfloat16", "float32"),
                                                    ("bfloat16", "bfloat16")])  # fmt: skip
def test_dtypes(dtype, state_dtype):
    config = dataclasses.replace(TINY, dtype=dtype, state_dtype=state_dtype)
    model, params = _init(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    apply = jax.jit(model.apply, static_argnames="method")
    hidden, state = apply({"params": params}, TOKENS, method="prefill")
    assert hidden.dtype == jnp.dtype(dtype) and state[0].ssm.dtype == state[0].b.dtype == jnp.dtype(state_dtype)
    zero = model.initial_state(2, 19)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), zero) == jax.tree.map(lambda v: (v.shape, v.dtype), state)
    logits, after = apply({"params": params}, TOKENS[:, 0], state, method="step")
    assert logits.dtype == jnp.float32 and logits.shape == (2, 64)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), after) == jax.tree.map(lambda v: (v.shape, v.dtype), state)


@pytest.mark.parametrize("tie", [True, False])
def test_separate_layers_change_no_bit(x64, tie):
    """Wide parameters, converted once or at every use; a tied head gets a copy of its own."""
    model, params = _init(dataclasses.replace(TINY, param_dtype="float64", tie_embeddings=tie))
    separate = model.separate_layers(params)
    assert separate["head"].dtype == jnp.float32 and separate["embedding"].dtype == jnp.float64
    assert model.separate_layers(separate) is separate
    step = jax.jit(
        lambda params: model.apply({"params": params}, TOKENS[:, 0], model.initial_state(2, 1), method="step")
    )
    jax.tree.map(np.testing.assert_array_equal, step(separate), step(params))


@pytest.mark.parametrize(("mixers", "rank"), [("mamba3", 1), ("mamba3", 2), ("mamba2", 1)])
def test_separate_layers_widen_what_the_scan_converts(mixers, rank):
    """Weights stored in bfloat16, some of them in float32 for decoding: no bit of a prompt or a step changes."""
    config = dataclasses.replace(TINY, mixers=mixers, mimo_rank=rank, dtype="bfloat16", param_dtype="bfloat16")
    model, params = _init(config)
    separate = model.separate_layers(params)
    assert {v.dtype for v in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert all(layer["mixer"]["d"].dtype == jnp.float32 for layer in separate["layers"])

    @jax.jit
    def run(params):
        hidden, state = model.apply({"params": params}, TOKENS[:, :-1], method="prefill")
        return hidden, model.apply({"params": params}, TOKENS[:, -1], state, method="step")

    jax.tree.map(np.testing.assert_array_equal, run(separate), run(params))


def test_initialisation():
    config = dataclasses.replace(TINY, d_model=64, n_layers=8, d_intermediate=128, mimo_rank=4)
    _, params = _init(config)
    layers, mixer = params["layers"], params["layers"]["mixer"]
    # A sample deviation of m normal numbers is off by about 1/√(2m); four of those.
    assert np.std(params["embedding"]) == pytest.approx(0.02, rel=4 / math.sqrt(2 * params["embedding"].size))
    for kernel, fan_in, gain in [
        (mixer["in_proj"]["kernel"], 64, 1.0),
        (layers["mlp"]["fc1"]["kernel"], 64, 1.0),
        (mixer["out_proj"]["kernel"], 128, 1 / math.sqrt(16)),
        (layers["mlp"]["fc2"]["kernel"], 128, 1 / math.sqrt(16)),
    ]:
        bound = gain / math.sqrt(fan_in)
        largest = np.abs(kernel).max()
        assert bound * (1 - 100 / kernel.size) < largest <= bound  # the largest of m uniform numbers
        assert np.std(kernel) == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(kernel.size))
    dt = np.asarray(jax.nn.softplus(mixer["dt_bias"]))
    assert dt.min() >= 1e-3 * (1 - 1e-5) and dt.max() <= 0.1 * (1 + 1e-5)
    assert np.median(dt) == pytest.approx(1e-2, rel=1.0)  # log-uniform: the middle is the geometric mean
    constants = {"b_bias": 1, "c_bias": 1, "d": 1, "mimo_x": 0.25, "mimo_z": 1, "mimo_o": 0.25}
    for name, value in constants.items():
        np.testing.assert_array_equal(mixer[name], np.full_like(mixer[name], value))


def test_first_layers_differ():
    _, params = _init(TINY)
    kernel = params["layers"]["mixer"]["in_proj"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_no_mlp_and_outproj_norm():
    config = dataclasses.replace(TINY, d_intermediate=0, outproj_norm=True)
    model, params = _init(config)
    assert "mlp" not in params["layers"] and params["layers"]["mixer"]["norm_scale"].shape == (2, 4, 8)
    assert np.isfinite(jax.jit(model.apply)({"params": params}, TOKENS)).all()


@pytest.mark.parametrize("change", [{"rope_fraction": 0.0}, {"rope_fraction": 1.0}, {"a_activation": "softplus"},
                                    {"ngroups": 4, "mimo_rank": 1}])  # fmt: skip
def test_variants_step_like_they_scan(change):
    model, params = _init(dataclasses.replace(TINY, **change))
    apply = jax.jit(model.apply, static_argnames="method")
    logits = apply({"params": params}, TOKENS)
    _, state = apply({"params": params}, TOKENS[:, :12], method="prefill")
    for t in range(12, 14):
        stepped, state = apply({"params": params}, TOKENS[:, t], state, method="step")
        tolerances.assert_close(stepped, logits[:, t], tolerances.rounding("float32", TINY.d_inner), f"token {t}")


@pytest.mark.parametrize("rows", [24, 40])  # a product with one-hot rows, and a lookup
def test_embedding_and_its_gradient(rows):
    model = LanguageModel(dataclasses.replace(TINY, vocab_size=rows))
    table = jax.random.normal(jax.random.key(0), (rows, TINY.d_model))
    tokens = jax.random.randint(jax.random.key(1), (3, 50), 0, rows)
    weights = jax.random.normal(jax.random.key(2), (3, 50, TINY.d_model))

    def embed(table):
        return model.apply({"params": {"embedding": table}}, tokens, method="_embed")

    assert (embed(table) == table[tokens]).all()
    gradient = jax.grad(lambda table: jnp.sum(embed(table) * weights))(table)
    expected = np.zeros_like(table)
    np.add.at(expected, np.asarray(tokens), np.asarray(weights))
    tolerances.assert_close(gradient, expected, tolerances.rounding(jnp.float32, tokens.size), "embedding")
