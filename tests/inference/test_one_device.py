"""On a machine with several devices, what runs on one of them has kernels to choose from."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from m3jax.config import ModelConfig
from m3jax.inference import Session, generate
from m3jax.inference.engine import Engine, Request
from m3jax.inference.likelihood import Continuation, score_continuations
from m3jax.kernels import one_device
from m3jax.kernels.gpu import partitioned
from m3jax.models.language_model import LanguageModel

pytestmark = pytest.mark.multidevice

seen: list[bool] = []


class Recording(LanguageModel):
    """Notes, as it is traced, whether XLA might divide the program over devices."""

    def logits(self, hidden):
        seen.append(partitioned())
        return super().logits(hidden)


def _mesh(devices):
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


def _generate(model, params):
    generate(model, params, [[1, 2]], max_new_tokens=2)


def _session(model, params):
    session = Session(model, params)
    session.read([1, 2])
    session.generate(max_new_tokens=2)


def _engine(model, params):
    engine = Engine(model, params, slots=1)
    engine.submit(Request([1, 2], max_new_tokens=2))
    engine.run()


def _score(model, params):
    list(score_continuations(model, params, [Continuation([1], [2])], max_length=4, batch_tokens=8))


@pytest.mark.parametrize("run", [_generate, _session, _engine, _score])
def test_where_parameters_are_decides(run):
    # A vocabulary of its own for each, so that each is traced.
    config = ModelConfig(
        vocab_size=20 + len(run.__name__), d_model=8, n_layers=1, d_intermediate=0, headdim=8, d_state=8
    )
    model = Recording(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    seen.clear()
    run(model, params)
    assert seen and not any(seen)
    seen.clear()
    run(model, jax.device_put(params, NamedSharding(_mesh(2), P())))
    assert seen and all(seen)


def test_a_mesh_says_how_many_devices_a_program_has():
    assert partitioned()
    with one_device():
        assert not partitioned()
    for devices, divided in ((1, False), (2, True)):
        with jax.sharding.use_abstract_mesh(_mesh(devices).abstract_mesh), one_device():
            assert partitioned() is divided

    def inside(v):
        assert not partitioned()
        return v

    jax.jit(jax.shard_map(inside, mesh=_mesh(2), in_specs=P("data"), out_specs=P("data")))(jnp.zeros(2))
