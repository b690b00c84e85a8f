"""Continuous batching: a request in a crowd is bit for bit the request alone, for every kind of model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import ModelConfig
from m3jax.errors import ConfigError, DataError
from m3jax.inference import Engine, Request, generate
from m3jax.models.language_model import LanguageModel

VOCAB = 61
TINY = ModelConfig(
    vocab_size=VOCAB, d_model=16, n_layers=1, d_intermediate=0, headdim=8, d_state=8, dtype="float32",
    attention_heads=4, attention_kv_heads=2, attention_headdim=8, gdn_heads=2, gdn_headdim=8,
)  # fmt: skip
MODELS = {
    "siso": {},
    "mimo": {"mimo_rank": 2},
    "mamba2": {"mixers": "mamba2"},
    "gated_deltanet": {"mixers": "gated_deltanet"},
    "attention": {"mixers": "attention"},
    "hybrid": {"mixers": "mamba3, attention", "n_layers": 2, "rope_theta": 0.0, "outproj_norm": True},
}
SIZES = dict(slots=3, capacity=64, block=4, prefill_tokens=48)


def build(name, **options):
    model = LanguageModel(dataclasses.replace(TINY, **MODELS[name]))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, params, Engine(model, params, **SIZES | options)


def requests():
    rng = np.random.default_rng(0)
    lengths = [3, 14, 1, 20, 7, 16]
    options = [dict(), dict(top_k=5, top_p=0.9), dict(temperature=0), dict(repetition_penalty=2.0), dict(min_p=0.1)]
    options.append(dict(temperature=0.8, stop_tokens=range(0, 56, 8)))
    shared = rng.integers(0, VOCAB, 9).tolist()
    prompts = [*(rng.integers(0, VOCAB, n).tolist() for n in lengths), shared, shared]
    return [
        Request(prompt, max_new_tokens=1 + 5 * (i % 3), seed=i, **options[i % len(options)])
        for i, prompt in enumerate(prompts)
    ]


def same(one, other):
    assert one.tokens == other.tokens
    assert one.logprobs == other.logprobs  # to the last bit
    assert one.reason == other.reason


@pytest.mark.parametrize("name", MODELS)
def test_in_a_crowd_as_alone(name):
    """Eight requests through three slots; then each alone in the same engine, over what the others left behind."""
    _, _, engine = build(name)
    numbers = [engine.submit(request) for request in requests()]
    together = engine.run()
    assert sorted(together) == numbers
    for number, request in zip(numbers, requests(), strict=True):
        assert together[number].reason == "length" or together[number].tokens[-1] in request.stop_tokens
        alone = engine.submit(request)
        same(engine.run()[alone], together[number])


@pytest.fixture(scope="module")
def hybrid():
    return build("hybrid")


def test_tokens_are_those_of_generate(hybrid):
    model, params, engine = hybrid
    for i, request in enumerate(requests()[:3]):
        number = engine.submit(request)
        options = {name: getattr(request, name) for name in ("temperature", "top_k", "top_p", "stop_tokens")}
        key = jax.random.key(request.seed)[None]
        expected = generate(model, params, [request.prompt], max_new_tokens=request.max_new_tokens, key=key, **options)
        assert engine.run()[number].tokens == expected[0][expected[0] >= 0].tolist(), i


def test_nothing_of_a_slot_survives(hybrid):
    """A state of NaN in every slot, as a diverged request would leave it, and the tokens stay."""
    *_, engine = hybrid
    clean = engine.submit(requests()[1])
    clean = engine.run()[clean]
    engine._rows = engine._rows._replace(
        state=jax.tree.map(lambda v: jnp.full_like(v, jnp.nan if v.dtype.kind == "f" else 9), engine._rows.state)
    )
    number = engine.submit(requests()[1])
    same(engine.run()[number], clean)


def test_prompts_compile_once_per_bucket(hybrid):
    *_, engine = hybrid
    rng = np.random.default_rng(1)

    def run(length, n):
        for seed in range(n):
            engine.submit(Request(rng.integers(0, VOCAB, length).tolist(), max_new_tokens=1 + seed, seed=seed))
        engine.run()

    for length in (16, 24):  # the two buckets
        run(length, 2)
    compiled = []

    def count(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for length in range(1, 25):
            run(length, 1 + length % 5)
        assert compiled == []
        run(25, 2)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) == 1


def test_on_token_hears_and_ends_and_its_error_harms_nobody_else(hybrid):
    *_, engine = hybrid
    request = dataclasses.replace(requests()[2], max_new_tokens=11)
    free = engine.submit(request)
    free = engine.run()[free]
    heard = []

    def end_at_3(token, logprob):
        heard.append((token, logprob))
        return len(heard) == 3

    def fail(token, logprob):
        raise ZeroDivisionError

    ended = engine.submit(dataclasses.replace(request, on_token=end_at_3))
    failing = engine.submit(dataclasses.replace(request, on_token=fail))
    other = engine.submit(request)
    with pytest.raises(ZeroDivisionError):
        engine.run()
    done = engine.run()
    same(done[other], free)
    assert done[ended].reason == done[failing].reason == "on_token"
    assert heard == list(zip(free.tokens[:3], free.logprobs[:3], strict=True))
    assert done[ended].tokens == free.tokens[:3] and len(done[failing].tokens) == 1


def test_what_was_done_before_an_error_comes_with_the_next_call(hybrid):
    *_, engine = hybrid

    def fail(token, logprob):
        raise ZeroDivisionError

    short = dataclasses.replace(requests()[2], max_new_tokens=1)
    one = engine.submit(short)
    for _ in range(3):  # so that the failing one has to wait for a slot
        last = engine.submit(dataclasses.replace(short, max_new_tokens=9))
    failing = engine.submit(dataclasses.replace(short, on_token=fail))
    with pytest.raises(ZeroDivisionError):
        engine.run()
    assert engine.run().keys() >= {one, last, failing}


def test_a_request_is_what_it_was_when_it_came(hybrid):
    *_, engine = hybrid
    prompt = np.array([1, 2, 3])
    number = engine.submit(Request(prompt, max_new_tokens=4))
    prompt[:] = 7
    again = engine.submit(Request([1, 2, 3], max_new_tokens=4))
    done = engine.run()
    same(done[number], done[again])


def test_with_64_bit_integers(x64):
    model, params, engine = build("hybrid", slots=1)
    number = engine.submit(Request([1, 2, 3], max_new_tokens=4, temperature=0))
    assert (
        engine.run()[number].tokens == generate(model, params, [[1, 2, 3]], max_new_tokens=4, temperature=0)[0].tolist()
    )


def test_requests_may_come_while_others_run(hybrid):
    *_, engine = hybrid
    for request in requests():
        engine.submit(request)
    expected = [completion for _, completion in sorted(engine.run().items())]
    numbers, done = [], {}
    for request in requests():
        numbers.append(engine.submit(request))
        done |= engine.step()
    done |= engine.run()
    for number, completion in zip(numbers, expected, strict=True):
        same(done[number], completion)


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ConfigError, dict(max_new_tokens=0), "max_new_tokens = 0"),
        (ConfigError, dict(temperature=-1), "temperature = -1"),
        (ConfigError, dict(repetition_penalty=0), "repetition_penalty = 0: expected .* over 0"),
        (ConfigError, dict(seed=-1), r"seed = -1: expected an integer in \[0, 2\^32\)"),
        (ConfigError, dict(stop_tokens=range(9)), "stop_tokens holds 9 ids: expected at most 8"),
        (ConfigError, dict(max_new_tokens=49), "rounded up to 16, and max_new_tokens = 49 need room for 65: .* = 64"),
        (DataError, dict(prompt=[VOCAB]), "= 61: expected"),
    ],
)
def test_bad_requests_are_refused(hybrid, error, change, message):
    with pytest.raises(error, match=message):
        hybrid[2].submit(dataclasses.replace(Request([1, 2], max_new_tokens=2), **change))


def test_bad_sizes_are_refused():
    model = LanguageModel(dataclasses.replace(TINY, mixers="attention"))
    with pytest.raises(ConfigError, match="capacity = None: expected the tokens"):
        Engine(model, {}, slots=2)
    with pytest.raises(ConfigError, match="slots = 0: expected an integer of at least 1"):
        Engine(model, {}, slots=0, capacity=9)
