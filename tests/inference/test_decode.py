"""Generation from token ids on the real model, against repeated full forwards and each prompt alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import ModelConfig
from m3jax.errors import ConfigError, DataError
from m3jax.inference import rows
from m3jax.inference.decode import generate
from m3jax.inference.prompts import left_pad
from m3jax.models.language_model import LanguageModel
from tests.tolerances import assert_close, rounding

VOCAB = 61  # the embedding has 64 rows
N_NEW = 10
LENGTHS = (3, 14, 1, 7)  # all of one bucket: few compilations
CONFIG = ModelConfig(
    vocab_size=VOCAB, d_model=32, n_layers=2, d_intermediate=0, headdim=16, d_state=16, mimo_rank=2, dtype="float32"
)
MODEL = LanguageModel(CONFIG)
KEYS = jax.random.split(jax.random.key(7), len(LENGTHS))
forward = jax.jit(lambda params, tokens: MODEL.apply({"params": params}, tokens))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).tolist() for n in LENGTHS]


def right_pad(prompts):
    return np.array([prompt + [0] * (32 - len(prompt)) for prompt in prompts], np.int32)


@pytest.fixture(scope="module")
def greedy(params, prompts):
    return generate(MODEL, params, prompts, max_new_tokens=N_NEW, temperature=0)


def test_greedy_is_the_repeated_argmax_of_full_forwards(params, prompts, greedy):
    rows, lengths = right_pad(prompts), np.array(LENGTHS)
    for step in range(N_NEW):
        logits = np.asarray(forward(params, rows))[np.arange(len(prompts)), lengths - 1, :VOCAB]
        assert greedy[:, step].tolist() == logits.argmax(axis=-1).tolist()
        rows[np.arange(len(prompts)), lengths] = logits.argmax(axis=-1)
        lengths += 1
    assert greedy.dtype == np.int32


@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=0.9), dict(top_k=20, top_p=0.9, min_p=0.01)])
def test_prompts_together_are_the_prompts_alone(params, prompts, options):
    together = generate(MODEL, params, prompts, max_new_tokens=N_NEW, key=KEYS, **options)
    for i, prompt in enumerate(prompts):
        alone = generate(MODEL, params, [prompt], max_new_tokens=N_NEW, key=KEYS[i : i + 1], **options)
        assert alone[0].tolist() == together[i].tolist()


def test_left_padding_changes_no_hidden_and_no_state(params, prompts):
    @jax.jit
    def prefill(tokens, segment_ids=None):
        return MODEL.apply({"params": params}, tokens, segment_ids, method="prefill")

    tokens, segment_ids = left_pad(prompts, len(prompts) + 1, 16)
    padded, padded_state = prefill(tokens, segment_ids)
    alone, state = prefill(np.array(prompts[:1]))
    tolerance = rounding(jnp.float32, CONFIG.d_model)
    assert_close(padded[:1, -LENGTHS[0] :], alone, tolerance, "hidden")
    for layer, padded_layer in zip(state, padded_state, strict=True):
        for name, leaf in layer._asdict().items():
            assert_close(getattr(padded_layer, name)[:1], leaf, tolerance, name)


def test_rows_may_have_parameters_of_their_own(params, prompts, greedy):
    mixed = generate(
        MODEL, params, prompts, max_new_tokens=N_NEW, temperature=[0, 1, 1, 0], top_k=[0, 0, 1, 5], key=KEYS
    )
    sampled = generate(MODEL, params, prompts, max_new_tokens=N_NEW, key=KEYS)
    assert mixed[[0, 2, 3]].tolist() == greedy[[0, 2, 3]].tolist()
    assert mixed[1].tolist() == sampled[1].tolist() != greedy[1].tolist()


def test_key_decides_the_tokens(params, prompts):
    def tokens(key):
        return generate(MODEL, params, prompts, max_new_tokens=N_NEW, key=key).tolist()

    first = tokens(jax.random.key(1))
    assert tokens(jax.random.key(1)) == first
    assert tokens(jax.random.PRNGKey(1)) == first
    assert tokens(jax.random.key(2)) != first
    assert tokens(None) == tokens(jax.random.key(0))


def test_same_prompt_in_every_row_gives_different_samples(params):
    rows = generate(MODEL, params, [[1, 2, 3]] * 4, max_new_tokens=N_NEW, key=jax.random.key(0))
    assert len({tuple(row) for row in rows.tolist()}) == 4


def test_two_calls_continue_as_one(params, prompts):
    whole = generate(MODEL, params, prompts, max_new_tokens=N_NEW, key=KEYS)
    first = generate(MODEL, params, prompts, max_new_tokens=2, key=KEYS)
    longer = [prompt + row for prompt, row in zip(prompts, first.tolist(), strict=True)]
    second = generate(MODEL, params, longer, max_new_tokens=N_NEW - 2, key=KEYS)
    assert np.concatenate([first, second], axis=1).tolist() == whole.tolist()


def test_stop_token_ends_its_row_alone(params, prompts, greedy):
    stop = int(greedy[1, 4])
    stopped = generate(MODEL, params, prompts, max_new_tokens=N_NEW, temperature=0, stop_tokens=[stop])
    for row, free in zip(stopped.tolist(), greedy.tolist(), strict=True):
        end = free.index(stop) + 1 if stop in free else N_NEW
        assert row == free[:end] + [-1] * (N_NEW - end)
    assert -1 in stopped[1]


def test_on_tokens_hears_every_step_and_can_end_rows(params, prompts, greedy):
    heard = []

    def end_row_2_at_step_3(tokens):
        heard.append(tokens.tolist())
        return np.arange(len(prompts)) == 2 if len(heard) == 3 else None

    tokens = generate(MODEL, params, prompts, max_new_tokens=N_NEW, temperature=0, on_tokens=end_row_2_at_step_3)
    expected = greedy.copy()
    expected[2, 3:] = -1
    assert tokens.tolist() == expected.tolist()
    assert np.array(heard).T.tolist() == expected.tolist()


def test_logprobs_are_those_of_full_forwards(params, prompts):
    options = dict(max_new_tokens=N_NEW, temperature=0.7, top_k=9, repetition_penalty=1.3, key=KEYS)
    tokens, logprobs = generate(MODEL, params, prompts, **options, stop_tokens=range(0, VOCAB, 9), return_logprobs=True)
    assert -1 in tokens
    rows_ = right_pad([prompt + row[row >= 0].tolist() for prompt, row in zip(prompts, tokens, strict=True)])
    expected = np.asarray(jax.nn.log_softmax(forward(params, rows_)[..., :VOCAB], axis=-1))
    for i, (length, row) in enumerate(zip(LENGTHS, tokens, strict=True)):
        n = int((row >= 0).sum())
        of_row = expected[i, np.arange(length - 1, length - 1 + n), row[:n]]
        assert_close(logprobs[i, :n], of_row, rounding(jnp.float32, CONFIG.d_model), f"row {i}")
        assert not logprobs[i, n:].any()


def test_repetition_penalty_looks_at_prompt_and_continuation(params, prompts, greedy):
    """So strong that no token comes twice; and one of less than 1 makes the prompt's own tokens certain."""
    tokens = generate(MODEL, params, prompts, max_new_tokens=N_NEW, temperature=0, repetition_penalty=1e6)
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        assert len(set(row)) == N_NEW and not set(row) & set(prompt)
    loud = dict(params, embedding=params["embedding"] * 100)
    tokens = generate(MODEL, loud, prompts, max_new_tokens=N_NEW, temperature=0, repetition_penalty=[1e-6, 1, 1, 1])
    assert set(tokens[0].tolist()) <= set(prompts[0])


def test_equal_prompts_are_read_once_and_drawn_apart(params, prompts):
    read_ = []

    class Listening(LanguageModel):
        def prefill(self, tokens, segment_ids=None, state=None):
            jax.debug.callback(lambda ids: read_.append(int(ids.any(axis=1).sum())), segment_ids)
            return super().prefill(tokens, segment_ids, state)

    four = [prompts[0], prompts[1], prompts[0], prompts[0]]
    shared = generate(Listening(CONFIG), params, four, max_new_tokens=N_NEW, key=KEYS)
    jax.effects_barrier()
    assert read_ == [2]
    for i, prompt in enumerate(four):
        alone = generate(MODEL, params, [prompt], max_new_tokens=N_NEW, key=KEYS[i : i + 1])
        assert shared[i].tolist() == alone[0].tolist()


def test_decoding_ends_when_all_rows_have(params, prompts, greedy):
    heard = []

    def end_all_at_step_2(tokens):
        heard.append(tokens)
        return [len(heard) == 2] * len(prompts)

    tokens = generate(MODEL, params, prompts, max_new_tokens=N_NEW, temperature=0, on_tokens=end_all_at_step_2)
    assert len(heard) == 2
    assert tokens[:, :2].tolist() == greedy[:, :2].tolist()
    assert (tokens[:, 2:] == -1).all()


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()])
def test_error_of_on_tokens_reaches_the_caller(params, prompts, error):
    calls = []

    def fail(tokens):
        calls.append(tokens)
        raise error

    with pytest.raises(type(error)) as raised:
        generate(MODEL, params, prompts, max_new_tokens=N_NEW, temperature=0, on_tokens=fail)
    assert raised.value is error
    assert len(calls) == 1


def test_answer_of_on_tokens_of_another_shape_is_refused(params, prompts):
    with pytest.raises(ValueError, match="on_tokens returned shape"):
        generate(MODEL, params, prompts, max_new_tokens=N_NEW, temperature=0, on_tokens=lambda tokens: [True])


def test_lengths_and_parameters_compile_nothing(params):
    def run(length, max_new_tokens, stop_tokens, **options):
        prompt = np.ones((len(LENGTHS), length), np.int64)
        return generate(MODEL, params, prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, **options)

    run(5, 3, [], key=jax.random.key(0))
    compiled = []

    def count(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for length in range(1, 17):
            tokens = run(length, 1 + length % 4, [0] * (length % 9), top_k=length % 3, key=jax.random.key(length))
            assert tokens.shape == (len(LENGTHS), 1 + length % 4)
        assert compiled == []
        run(17, 3, [], key=jax.random.key(0))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) == 2  # empty rows with more room, and the prefill


def test_other_instance_of_the_same_model_compiles_nothing(params, prompts, greedy):
    before = rows.decode._cache_size()
    tokens = generate(LanguageModel(dataclasses.replace(CONFIG)), params, prompts, max_new_tokens=N_NEW, temperature=0)
    assert rows.decode._cache_size() == before
    assert tokens.tolist() == greedy.tolist()


def test_padding_rows_of_the_embedding_are_never_drawn(params, prompts):
    direction = params["embedding"][0]
    loud = dict(
        params, embedding=params["embedding"].at[VOCAB:].set(jnp.stack([direction, -direction, direction]) * 1e4)
    )
    assert forward(loud, right_pad(prompts))[0, LENGTHS[0] - 1].argmax() >= VOCAB
    for temperature in (0, 1, 1e6):
        tokens = generate(MODEL, loud, prompts, max_new_tokens=N_NEW, temperature=temperature, top_k=[0, 3, 0, 3])
        assert tokens.min() >= 0
        assert tokens.max() < VOCAB


@pytest.mark.parametrize("container", [np.array, jnp.array, list, lambda rows: np.array(rows, np.uint16)])
def test_prompts_may_come_in_any_container(params, container):
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    tokens = generate(MODEL, params, container(rows), max_new_tokens=np.int64(4), temperature=0)
    assert tokens.tolist() == generate(MODEL, params, rows, max_new_tokens=4, temperature=0).tolist()


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ConfigError, dict(max_new_tokens=0), "max_new_tokens = 0: expected an integer of at least 1"),
        (ConfigError, dict(max_new_tokens=2.0), "max_new_tokens = 2.0: expected"),
        (ConfigError, dict(max_new_tokens=True), "max_new_tokens = True: expected"),
        (ConfigError, dict(temperature=-1), "temperature = -1: expected .* at least 0"),
        (ConfigError, dict(top_p=0.0), r"top_p = 0.0: expected .* in \(0, 1\]"),
        (ConfigError, dict(top_k=[1, 2, 3]), r"top_k = \[1, 2, 3\]: expected one integer, or one for each of the 1"),
        (ConfigError, dict(stop_tokens=[VOCAB]), r"stop_tokens holds 61: expected token ids in \[0, 61\)"),
        (ConfigError, dict(stop_tokens=["."]), r"stop_tokens holds '.': expected"),
        (ConfigError, dict(key=0), r"key = 0: expected a random key, such as jax.random.key\(0\)"),
        (ConfigError, dict(key=jax.random.key(0, impl="rbg")), "key is of rbg, .*: expected one of threefry2x32"),
        (ConfigError, dict(key=KEYS), r"key has shape \(4,\): expected one random key"),
        (DataError, dict(prompt_tokens=[[0, VOCAB]]), r"prompt_tokens\[0\]\[1\] = 61: expected"),
        (DataError, dict(prompt_tokens=[[]]), r"prompt_tokens\[0\] is empty"),
    ],
)
def test_bad_arguments_are_refused_before_anything_compiles(error, options, message):
    arguments = dict(prompt_tokens=[[1, 2]], max_new_tokens=2) | options
    with pytest.raises(error, match=message):
        generate(MODEL, {}, **arguments)  # parameters that no program can be compiled with
