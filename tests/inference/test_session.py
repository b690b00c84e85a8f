"""Sessions: pieces equal the whole, forks are apart, and a file gives back the same or says why not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from m3jax.config import ModelConfig
from m3jax.errors import CheckpointError, ConfigError, DataError
from m3jax.inference import Session, generate
from m3jax.models.language_model import LanguageModel

CONFIG = ModelConfig(
    vocab_size=61, d_model=16, n_layers=2, mixers="mamba3, attention", d_intermediate=0, headdim=8, d_state=8,
    mimo_rank=2, dtype="float32", state_dtype="bfloat16", attention_heads=4, attention_kv_heads=2, attention_headdim=8,
)  # fmt: skip
MODEL = LanguageModel(CONFIG)
PROMPT = np.random.default_rng(0).integers(0, 61, 8).tolist()
OPTIONS = dict(temperature=0.8, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def params():
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return jax.jit(MODEL.separate_layers)(params)


@pytest.fixture
def session(params):
    session = Session(MODEL, params, capacity=40)
    session.read(PROMPT[:6])
    session.read(PROMPT[6:])
    return session


def test_turns_are_one_sequence(params, session):
    """What `generate` makes of all that came before, the tokens of the first turn among it."""

    def expected(prompt, n):
        key = jax.random.key(3)[None]
        return generate(MODEL, params, [prompt], max_new_tokens=n, key=key, **OPTIONS)[0].tolist()

    first = session.generate(max_new_tokens=3, seed=3, **OPTIONS)
    assert first == expected(PROMPT, 3)
    session.read([7])
    assert session.length == 12
    second = session.generate(max_new_tokens=3, seed=3, **OPTIONS)
    assert second == expected([*PROMPT, *first, 7], 3)
    third = session.generate(max_new_tokens=2, seed=3, **OPTIONS)
    assert third == expected([*PROMPT, *first, 7, *second], 2)


def test_forks_do_not_see_each_other(session):
    fork = session.fork()
    fork.read([1])
    fork.generate(max_new_tokens=3, seed=1)
    again = session.fork()
    assert session.generate(max_new_tokens=6, seed=5) == again.generate(max_new_tokens=6, seed=5)
    assert fork.length == session.length - 2


def test_file_gives_the_same_session(params, session, tmp_path):
    session.generate(max_new_tokens=3, seed=2)
    session.read([4])
    session.save(tmp_path / "s")
    restored = Session.load(tmp_path / "s", MODEL, params)
    for one, other in zip(jax.tree.leaves(restored._state), jax.tree.leaves(session._state), strict=True):
        assert one.dtype == other.dtype and (one == other).all()
    assert restored.length == session.length
    assert restored.generate(max_new_tokens=6, seed=5, **OPTIONS) == session.generate(
        max_new_tokens=6, seed=5, **OPTIONS
    )
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("capacity", [100, 20])
def test_file_is_gone_on_from_with_other_room(params, session, tmp_path, capacity):
    session.generate(max_new_tokens=3, seed=2)
    session.save(tmp_path / "s")
    restored = Session.load(tmp_path / "s", MODEL, params, capacity=capacity)
    more = {"max_new_tokens": 20 - session.length, "seed": 5, **OPTIONS}
    assert restored.generate(**more) == session.generate(**more)
    with pytest.raises(ConfigError, match=f"after 20 need .*: expected at most capacity = {capacity}; .*--capacity"):
        restored.generate(max_new_tokens=capacity - 19)
    restored.save(tmp_path / "s")
    with pytest.raises(ConfigError, match="capacity = 19: expected room for the 20 tokens"):
        Session.load(tmp_path / "s", MODEL, params, capacity=19)
    assert Session.load(tmp_path / "s", MODEL, params)._capacity == capacity


def test_weights_are_the_same_as_stored_and_wider(tmp_path):
    """A file knows its weights by their bits as they are stored."""
    model = LanguageModel(dataclasses.replace(CONFIG, param_dtype="bfloat16", dtype="bfloat16"))
    stored = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    wide = jax.jit(model.separate_layers)(stored)
    narrow = jax.tree.map(lambda v: v.astype(jnp.bfloat16), wide)
    assert wide["layers"][0]["mixer"]["b_bias"].dtype == jnp.float32
    session = Session(model, narrow, capacity=4)
    session.read(PROMPT[:2])
    session.save(tmp_path / "session")
    assert Session.load(tmp_path / "session", model, wide).length == 2


def test_stop_tokens_and_on_token_end_a_turn_and_errors_change_nothing(session):
    free = session.fork().generate(max_new_tokens=8, temperature=0)
    stopped = session.fork()
    assert stopped.generate(max_new_tokens=8, temperature=0, stop_tokens=free[2:3])[-1] == free[2]
    heard = []
    ended = session.fork()
    ended.generate(max_new_tokens=8, temperature=0, on_token=lambda token: heard.append(token) or len(heard) == 3)
    assert heard == free[:3] and ended.length == session.length + 3

    def fail(token):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.generate(max_new_tokens=8, temperature=0, on_token=fail)
    assert session.generate(max_new_tokens=8, temperature=0) == free


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mixers="attention, mamba3"), "mixers = 'mamba3, attention', expected 'attention, mamba3'"),
        (dict(attention_kv_heads=None), "attention_kv_heads = 2, expected None"),
        (dict(d_state=16), "a session of another model: d_state = 8, expected 16"),
        (dict(state_dtype="float32"), "a session of another model: state_dtype = 'bfloat16', expected 'float32'"),
        (dict(vocab_size=max(PROMPT)), f"a session of another model: vocab_size = 61, expected {max(PROMPT)}"),
    ],
)
def test_session_of_another_model_is_refused(session, params, tmp_path, change, message):
    session.save(tmp_path / "s")
    with pytest.raises(CheckpointError, match=message):
        Session.load(tmp_path / "s", LanguageModel(dataclasses.replace(CONFIG, **change)), params)


def test_keys_that_a_state_does_not_depend_on_may_differ(params, session, tmp_path):
    session.save(tmp_path / "s")
    initialisation = dict(dt_min=1e-2, dt_max=1.0, dt_init_floor=0.0, residuals_per_layer=1)
    computation = dict(chunk_size=8, scan_implementation="xla", remat="none", scan_layers=False)
    model = LanguageModel(dataclasses.replace(CONFIG, **initialisation, **computation))
    assert Session.load(tmp_path / "s", model, params).length == session.length


def test_a_model_may_be_written_in_another_way(tmp_path):
    config = dataclasses.replace(CONFIG, mixers="attention", attention_kv_heads=None, d_intermediate=100)
    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.jit(model.separate_layers)(params)
    Session(model, params, capacity=4).save(tmp_path / "s")
    for mixers in ("attention, attention", "attention,attention"):
        other = dataclasses.replace(config, mixers=mixers, attention_kv_heads=4, d_intermediate=128)
        Session.load(tmp_path / "s", LanguageModel(other), params).save(tmp_path / "s")


def test_damaged_files_are_refused(session, params, tmp_path):
    path = tmp_path / "s"
    session.save(path)
    embedding = params["embedding"]
    for other in (embedding.at[3, 2].add(1), embedding[::-1], -embedding):
        with pytest.raises(CheckpointError, match="of other weights"):
            Session.load(path, MODEL, dict(params, embedding=other))
    whole = path.read_bytes()
    with safetensors.safe_open(path, framework="np") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "state/0/ssm"
    for change, message in [
        ({name: tensors[name][:, :1]}, r"state/0/ssm is bfloat16 \(1, 1, 8, 8\): expected bfloat16 \(1, 4, 8, 8\)"),
        ({name: tensors[name].astype(np.float32)}, "state/0/ssm is float32"),
        ({"state/1/keys": tensors["state/1/keys"][:, :, 1:]}, r"state/1/keys is .* \(1, 2, 39, 8\): expected"),
        ({"state/7/ssm": tensors[name]}, "state/7/ssm is in the file or in the model alone"),
    ]:
        path.write_bytes(safetensors.numpy.save(tensors | change, about))
        with pytest.raises(CheckpointError, match=message):
            Session.load(path, MODEL, params)
    for part, value in (("length", "x"), ("capacity", '"x"'), ("model", '"x"'), ("model", "no JSON")):
        path.write_bytes(safetensors.numpy.save(tensors, about | {part: value}))
        with pytest.raises(CheckpointError, match="is damaged"):
            Session.load(path, MODEL, params)
    path.write_bytes(safetensors.numpy.save(tensors | {"unread": np.array([61], np.int32)}, about))
    with pytest.raises(CheckpointError, match=r"is damaged \(DataError: prompt_tokens\[0\]\[0\] = 61"):
        Session.load(path, MODEL, params)
    path.write_bytes(safetensors.numpy.save(tensors, about | {"format": "other"}))
    with pytest.raises(CheckpointError, match="format = 'other'"):
        Session.load(path, MODEL, params)
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="Cannot read"):
        Session.load(path, MODEL, params)
    with pytest.raises(CheckpointError, match="Cannot read"):
        Session.load(tmp_path / "none", MODEL, params)


def test_bad_arguments_are_named(session, params):
    with pytest.raises(ConfigError, match="capacity = None: expected an integer"):
        Session(MODEL, params)
    with pytest.raises(ConfigError, match="33 tokens after 8 need room for 41: expected at most capacity = 40"):
        session.generate(max_new_tokens=33)
    with pytest.raises(DataError, match="= 61: expected"):
        session.read([61])
    with pytest.raises(ConfigError, match="The session is empty"):
        Session(MODEL, params, capacity=9).generate(max_new_tokens=1)
