"""The same numbers on one device and on eight, however they are arranged."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from m3jax.errors import ConfigError
from m3jax.models import scan_on_mesh
from m3jax.models.language_model import LanguageModel
from m3jax.training.sharding import make_mesh, shard_batch, state_shardings
from m3jax.training.step import init_state, make_train_step
from tests.tolerances import assert_close, rounding
from tests.training.conftest import SmallModel
from tests.training.test_step import LENGTH, ROWS, make_batch

pytestmark = [pytest.mark.multidevice, pytest.mark.usefixtures("quick_compilation")]


def train_three_steps(config, model, make=make_batch):
    """Returns the losses, the state after three steps and the compiled step."""
    mesh = make_mesh(config)
    shardings = state_shardings(jax.eval_shape(lambda: init_state(config, model)), mesh)
    state = jax.jit(lambda: init_state(config, model), out_shardings=shardings)()
    batches = [shard_batch(make(seed), mesh) for seed in range(3)]
    train_step = make_train_step(config, model, mesh).lower(state, batches[0], jnp.asarray(True)).compile()
    losses = []
    for batch in batches:
        state, metrics = train_step(state, batch, jax.device_put(True, NamedSharding(mesh, P())))
        losses.append(float(metrics["loss"]))
    return losses, state, train_step.as_text()


def assert_same_run(config, model, reference, make=make_batch):
    losses, state, program = train_three_steps(config, model, make)
    # Each step adds the rounding of sums over all tokens to what the steps before it have left.
    tolerance = 3 * rounding(jnp.float32, ROWS * LENGTH)
    assert_close(losses, reference[0], tolerance, "losses")
    for name in ("params", "opt_state"):
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(getattr(state, name)),
            jax.tree.leaves(getattr(reference[1], name)),
            strict=True,
        ):
            assert_close(a, b, tolerance, f"{name}{jax.tree_util.keystr(path)}")
    return state, program


# Adam divides a gradient by its own size: where that is rounding noise, so is the direction. A large eps avoids it.
LARGE_EPS = {"optimizer.eps": 1e-3}


@pytest.fixture(scope="module")
def one_device(small_config):
    config = small_config(LARGE_EPS)
    return train_three_steps(config, SmallModel(config.model))


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_mesh_equals_one_device(small_config, one_device, data, fsdp):
    config = small_config(LARGE_EPS | {"mesh.data": data, "mesh.fsdp": fsdp})
    state, _ = assert_same_run(config, SmallModel(config.model), one_device)
    spec = P("fsdp", None) if fsdp > 1 else P()
    assert state.params["embedding"].sharding.spec == spec
    assert state.opt_state[1].nu["embedding"].sharding.spec == spec


def test_accumulation_on_a_mesh(small_config, one_device):
    config = small_config(LARGE_EPS | {"mesh.data": 2, "mesh.fsdp": 2, "train.grad_accumulation": 2})
    assert_same_run(config, SmallModel(config.model), one_device)


def test_mamba3_on_a_two_by_four_mesh_equals_one_device(small_config, monkeypatch):
    changes = LARGE_EPS | {"model.mimo_rank": 2}
    config = small_config(changes)
    reference = train_three_steps(config, LanguageModel(config.model))
    rows, scan = set(), scan_on_mesh.mamba3_scan
    monkeypatch.setattr(scan_on_mesh, "mamba3_scan", lambda **args: rows.add(args["x"].shape[:2]) or scan(**args))
    config = small_config(changes | {"mesh.data": 2, "mesh.fsdp": 4})
    _, program = assert_same_run(config, LanguageModel(config.model), reference)
    # The scan runs per device on its row of eight, as a kernel has to; (1, 2) is the initialisation.
    assert rows == {(1, 2), (1, LENGTH)}
    # Parameters travel, activations do not: nothing is exchanged, and what is gathered are matrices.
    assert "all-to-all(" not in program and "collective-permute(" not in program
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program)
    assert gathered and all(shape.count(",") == 1 for shape in gathered), gathered


def packed_batch(seed=0):
    """Documents that end and begin anywhere."""
    starts = np.random.default_rng(seed).random((ROWS, LENGTH)) < 0.1
    return make_batch(seed) | {"segment_ids": np.cumsum(starts, axis=1).astype(np.int32)}


@pytest.mark.parametrize(("mixers", "mesh"), [
    ("mamba3", {"mesh.data": 2, "mesh.fsdp": 2, "mesh.sequence": 2}),
    ("mamba3,mamba2,gated_deltanet,attention", {"mesh.data": 1, "mesh.sequence": 4}),
], ids=["mamba3", "all"])  # fmt: skip
def test_devices_share_sequences(small_config, mixers, mesh, monkeypatch):
    layers = mixers.count(",") + 1
    changes = LARGE_EPS | {"model.mixers": mixers, "model.n_layers": layers, "model.mimo_rank": 2}
    config = small_config(changes)
    reference = train_three_steps(config, LanguageModel(config.model), packed_batch)
    lengths, scan = set(), scan_on_mesh.mamba3_scan
    monkeypatch.setattr(scan_on_mesh, "mamba3_scan", lambda **args: lengths.add(args["x"].shape[1]) or scan(**args))
    config = small_config(changes | mesh)
    assert_same_run(config, LanguageModel(config.model), reference, packed_batch)
    assert lengths == {2, LENGTH // config.mesh.sequence}  # 2: the initialisation


def test_only_matrices_are_divided_and_never_over_layers(small_config):
    config = small_config({"mesh.data": 1, "mesh.fsdp": 8, "model.n_layers": 8})
    shapes = {
        "layers": {
            "in_proj": {"kernel": jax.ShapeDtypeStruct((8, 24, 64), jnp.float32)},
            "mimo_x": jax.ShapeDtypeStruct((8, 16, 4, 64), jnp.float32),
        },
        "embedding": jax.ShapeDtypeStruct((264, 32), jnp.float32),
        "odd": {"kernel": jax.ShapeDtypeStruct((99, 101), jnp.float32)},
        "head": jax.ShapeDtypeStruct((99, 104), jnp.float32),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    specs = jax.tree.map(lambda s: s.spec, state_shardings(shapes, make_mesh(config)))
    assert specs == {
        "layers": {"in_proj": {"kernel": P(None, "fsdp", None)}, "mimo_x": P()},
        "embedding": P("fsdp", None),
        "odd": {"kernel": P()},
        "head": P(None, "fsdp"),
        "count": P(),
    }


def test_batch_rows_go_to_their_devices(small_config):
    batch = make_batch()
    sharded = shard_batch(batch, make_mesh(small_config({"mesh.data": 4, "mesh.fsdp": 2})))
    np.testing.assert_array_equal(sharded["tokens"], batch["tokens"])
    assert {shard.data.shape for shard in sharded["tokens"].addressable_shards} == {(1, LENGTH)}
    sharded = shard_batch(batch, make_mesh(small_config({"mesh.data": 2, "mesh.sequence": 4})))
    np.testing.assert_array_equal(sharded["tokens"], batch["tokens"])
    assert {shard.data.shape for shard in sharded["tokens"].addressable_shards} == {(4, LENGTH // 4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.data": 4, "mesh.fsdp": 4}, "16 devices: there are 8"),
        ({"mesh.data": 8, "data.batch_size": 12}, "config.data.batch_size = 12.*multiple of the 8 devices"),
        ({"mesh.data": 8, "train.grad_accumulation": 2}, "8 in 2 microbatches.*4 sequences.*multiple of the 8"),
        ({"mesh.sequence": 4, "data.sequence_length": 30}, "mesh.sequence = 4.*divisor of data.sequence_length = 30"),
    ],
)
def test_sizes_that_do_not_fit(small_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(small_config(changes))


def test_default_uses_every_device(small_config):
    assert make_mesh(small_config({"mesh.data": -1, "mesh.fsdp": 2})).shape == {"data": 4, "fsdp": 2, "sequence": 1}
    assert make_mesh(small_config({"mesh.data": -1, "mesh.sequence": 4})).shape == {"data": 2, "fsdp": 1, "sequence": 4}
