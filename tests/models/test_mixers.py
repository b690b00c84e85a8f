"""What every mixer and mixtures of them promise: documents, causality, and one answer however the tokens come."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from m3jax.config import ModelConfig
from m3jax.models.language_model import LanguageModel
from m3jax.models.mixers import MIXERS
from m3jax.models.own_rows import on_own_rows
from tests import tolerances

TINY = ModelConfig(
    vocab_size=61, d_model=16, n_layers=1, d_intermediate=0, headdim=8, d_state=8, dtype="float32",
    attention_heads=4, attention_kv_heads=2, attention_headdim=8,
    gdn_heads=2, gdn_headdim=8,
)  # fmt: skip
MODELS = {
    "mamba2": {"mixers": "mamba2", "ngroups": 2},
    "gated_deltanet": {"mixers": "gated_deltanet", "gdn_negative_eigenvalues": True},
    "attention": {"mixers": "attention"},
    "attention without positions": {"mixers": "attention", "rope_theta": 0.0},
    "hybrid": {"mixers": "mamba3, attention", "n_layers": 2, "rope_theta": 0.0, "outproj_norm": True},
}
TOKENS = np.random.default_rng(0).integers(0, 61, size=(2, 23))
DOCUMENTS = np.stack([np.repeat([1, 2, 3], [5, 1, 17]), np.repeat([4, 0, 7], [9, 8, 6])])
TOLERANCE = tolerances.rounding("float32", TINY.d_state * 23)  # sums run along the sequence


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    """(apply, parameters, model)."""
    built = LanguageModel(dataclasses.replace(TINY, **MODELS[request.param]))
    params = jax.jit(built.init)(jax.random.key(0), jnp.asarray(TOKENS))["params"]
    apply = jax.jit(built.apply, static_argnames="method")
    return lambda *args, **kwargs: apply({"params": params}, *args, **kwargs), params, built


def test_documents_do_not_see_each_other(model):
    apply, _, _ = model
    packed = apply(TOKENS, DOCUMENTS)
    for row, (first, last) in ((0, (6, 23)), (1, (9, 17))):
        alone = apply(TOKENS[row : row + 1, first:last])
        tolerances.assert_close(packed[row, first:last], alone[0], TOLERANCE, f"row {row}, tokens {first} to {last}")


def test_later_tokens_change_nothing(model):
    apply, _, _ = model
    changed = TOKENS.copy()
    changed[:, 11:] = (changed[:, 11:] + 1) % 61
    before, after = np.asarray(apply(TOKENS)), np.asarray(apply(changed))
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] != after[:, 11:]).any(axis=-1).all()


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
def test_pieces_and_steps_equal_the_whole(model, documents):
    apply, _, built = model

    def document(first, last):
        return None if documents is None else documents[:, first:last]

    expected = apply(TOKENS, documents)
    state = built.initial_state(2, 23)
    for first, last in ((0, 7), (7, 20)):
        if documents is not None:  # A call continues the document of the call before.
            assert (documents[:, first] == documents[:, max(first - 1, 0)]).all()
        hidden, state = apply(TOKENS[:, first:last], document(first, last), state, method="prefill")
        logits = apply(hidden, method="logits")
        tolerances.assert_close(logits, expected[:, first:last], TOLERANCE, f"tokens {first} to {last}")
    for t in range(20, 23):
        logits, state = apply(TOKENS[:, t], state, method="step")
        tolerances.assert_close(logits, expected[:, t], TOLERANCE, f"token {t}")


def test_ids_that_come_again_are_of_other_documents(model):
    apply, _, _ = model
    again = np.stack([np.repeat([5, 3, 5], [5, 1, 17]), np.repeat([5, 3, 5], [9, 8, 6])])
    np.testing.assert_array_equal(apply(TOKENS, again), apply(TOKENS, DOCUMENTS))


def test_gradients_reach_every_parameter(model):
    _, params, built = model

    def loss(params):
        return jnp.sum(jax.nn.log_softmax(built.apply({"params": params}, TOKENS, DOCUMENTS))[..., 0])

    gradients = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.multidevice
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_devices_of_a_mesh_mix_their_own_rows(mixer):
    config = dataclasses.replace(TINY, mixers=mixer)
    module = MIXERS[mixer].module(config)
    u = jax.random.normal(jax.random.key(0), (4, 8, config.d_model))
    documents = jnp.asarray(np.repeat([1, 2], 4))[None].repeat(4, axis=0)
    params = module.init(jax.random.key(1), u)
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), 2 * (AxisType.Auto,), devices=jax.devices()[:4])

    def mix(u):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return module.apply(params, u, documents)[0]

    rows = NamedSharding(mesh, P(("data", "fsdp")))
    program = jax.jit(mix, in_shardings=rows, out_shardings=rows).lower(u).compile()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program.as_text())
    tolerances.assert_close(program(jax.device_put(u, rows)), module.apply(params, u, documents)[0], TOLERANCE, "y")


@pytest.mark.multidevice
def test_arrays_without_elements_stay_outside_of_a_shard_map():
    """XLA's partitioner ends the process at such an argument of a kernel (jax 0.11.2)."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    rows = {"phase": jnp.zeros((4, 3, 0)), "x": jnp.arange(4.0), "none": None}

    def double(own, _):
        assert own["phase"].shape == (2, 3, 0) and own["none"] is None
        return 2 * own["x"]

    def double_all(rows):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return on_own_rows(double, rows, None)

    (mapped,) = (e for e in jax.make_jaxpr(double_all)(rows).eqns if e.primitive.name == "shard_map")
    assert [argument.aval.shape for argument in mapped.invars] == [(4,)]
    y = jax.jit(double_all, in_shardings=NamedSharding(mesh, P("data")))(rows)
    np.testing.assert_array_equal(y, 2 * rows["x"])


@pytest.mark.multidevice
def test_rows_that_the_devices_cannot_share_are_not_divided():
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        y = on_own_rows(lambda own, _: 2 * own["x"], {"x": jnp.arange(3.0)}, None)
    np.testing.assert_array_equal(y, [0, 2, 4])


def test_state_is_kept_in_shape(model):
    apply, _, built = model
    zero = built.initial_state(2, 30)
    _, state = apply(TOKENS, None, zero, method="prefill")
    assert jax.tree.map(lambda v: (v.shape, v.dtype), zero) == jax.tree.map(lambda v: (v.shape, v.dtype), state)
