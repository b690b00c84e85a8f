"""The draw of one token: each filter against plain numpy, the distribution, ties, rows that know nothing of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from m3jax.errors import ConfigError
from m3jax.inference.sampling import SamplingParams, log_probability, penalise, sample
from tests import tolerances

VOCAB = 11
N_DRAWS = 2000


@jax.jit
def _draw(logits, keys, params):
    """Tokens of rows that have none yet."""
    return sample(logits, jnp.zeros(logits.shape, bool), keys, params)[0]


def kept_by_numpy(logits, temperature, top_k, top_p, min_p):
    """Returns the ids that may be drawn and their probabilities, by sorting and counting in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: top_k or None]
    weight = np.exp(scaled[order] - scaled.max())
    share = weight / weight.sum()
    if top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(share)[:-1]])
        order = [i for i, b in zip(order, before, strict=True) if b < top_p]
    order = [i for i in order if np.exp(scaled[i] - scaled.max()) >= min_p]
    weight = np.exp(scaled[order] - scaled.max())
    return order, weight / weight.sum()


def draws(logits, n=N_DRAWS, seed=0, **params):
    """Draws n times from the same logits [V]."""
    keys = jax.random.split(jax.random.key(seed), n)
    return np.asarray(_draw(jnp.tile(jnp.asarray(logits), (n, 1)), keys, SamplingParams.for_batch(n, **params)))


# Quarters are exact in float32 and give many ties; p and min_p of this form never fall on a sum of such shares.
logit_rows = st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=VOCAB, max_size=VOCAB)


@settings(max_examples=40, deadline=None)
@given(
    logits=logit_rows,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.sampled_from([0.0123457, 0.3141593, 0.5772157, 0.9123457, 1.0]),
    min_p=st.sampled_from([0.0, 0.0531416, 0.3271828, 1.0]),
)
def test_support_and_distribution_match_numpy(logits, temperature, top_k, top_p, min_p):
    logits = np.array(logits, np.float32)
    params = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept, share = kept_by_numpy(logits, **params)
    counts = np.bincount(draws(logits, **params), minlength=VOCAB)
    assert set(np.flatnonzero(counts)) <= set(kept)
    likely = share * N_DRAWS > 30  # one that is never drawn has a chance of e^-30
    assert set(np.array(kept)[likely]) <= set(np.flatnonzero(counts))
    if len(kept) > 1:
        assert stats.chisquare(counts[kept], share * N_DRAWS).pvalue > 1e-7


@settings(max_examples=40, deadline=None)
@given(logits=logit_rows, top_k=st.integers(0, VOCAB), top_p=st.sampled_from([1e-30, 0.5, 1.0]))
def test_temperature_zero_takes_the_first_best(logits, top_k, top_p):
    logits = np.array(logits, np.float32)
    assert (draws(logits, temperature=0, top_k=top_k, top_p=top_p) == logits.argmax()).all()


@pytest.mark.parametrize("only_best", [dict(top_k=1), dict(top_p=1e-30), dict(top_p=1e-60), dict(temperature=1e-30)])
def test_narrowest_filter_keeps_exactly_the_best(only_best):
    logits = np.array([0, 3, 1, 2.9, -5], np.float32)
    assert (draws(logits, **only_best) == 1).all()


def test_equal_logits_are_drawn_evenly_and_filtered_from_the_front():
    logits = np.zeros(8, np.float32)
    assert stats.chisquare(np.bincount(draws(logits), minlength=8)).pvalue > 1e-7
    assert set(draws(logits, top_k=3)) == {0, 1, 2}
    assert set(draws(logits, top_p=0.6)) == {0, 1, 2, 3, 4}
    assert set(draws(logits, min_p=1.0)) == set(range(8))


def test_extreme_logits_stay_finite():
    logits = np.array([-1e30, 1e30, -np.inf, 1e30], np.float32)
    assert set(draws(logits, top_p=0.99)) == {1, 3}
    assert set(draws(logits, temperature=1e-6)) == {1, 3}
    assert set(draws(logits, temperature=1e6)) == {1, 3}


def test_top_p_1_keeps_a_tail_smaller_than_the_rounding_of_the_sum():
    """20 000 tail tokens of 1e-9 each vanish in a float32 sum near 1; a row must not lose them by its neighbour."""
    logits = np.full(20_000, np.log(1e-9), np.float32)
    logits[0] = 0
    keep_all = SamplingParams.for_batch(2, top_p=np.array([1.0, 0.5]), temperature=5.0)
    keys = jax.random.split(jax.random.key(1), 12)
    drawn = [int(_draw(jnp.tile(logits, (2, 1)), jnp.stack([key, key]), keep_all)[0]) for key in keys]
    alone = [int(_draw(logits[None], key[None], SamplingParams.for_batch(1, temperature=5.0))[0]) for key in keys]
    assert drawn == alone
    assert max(drawn) > 10_000


def test_a_row_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(0)
    rows = 12
    logits = rng.normal(size=(rows, VOCAB)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), rows)
    params = dict(
        temperature=np.array([0, 0.7, 1.0, 1.3] * 3),
        top_k=np.array([0, 0, 0, 0, 3, 3, 3, 3, 0, 0, 0, 0]),
        top_p=np.array([1.0] * 8 + [0.8] * 4),
        min_p=np.array([0, 0.1] * 6),
    )
    together = np.asarray(_draw(logits, keys, SamplingParams.for_batch(rows, **params)))
    for i in range(rows):
        alone = SamplingParams.for_batch(1, **{name: values[i] for name, values in params.items()})
        assert _draw(logits[i : i + 1], keys[i : i + 1], alone)[0] == together[i]


@pytest.mark.parametrize("filters", [{}, dict(top_k=4, top_p=0.9, min_p=0.01)], ids=["all", "filtered"])
def test_seen_tokens_are_penalised_in_the_draw_and_not_in_its_probability(filters):
    rng, rows = np.random.default_rng(0), 200
    logits = rng.normal(size=(rows, VOCAB)).astype(np.float32) * 3
    logits[:, 4], logits[0] = -np.inf, [1e30, *[-1e30] * (VOCAB - 1)]
    seen = rng.random((rows, VOCAB)) < 0.5
    keys = jax.random.split(jax.random.key(0), rows)
    params = SamplingParams.for_batch(rows, repetition_penalty=rng.uniform(0.5, 3, rows), temperature=0.8, **filters)
    tokens, logprobs = jax.jit(sample)(logits, seen, keys, params)
    plain = params._replace(repetition_penalty=np.ones(rows, np.float32))
    np.testing.assert_array_equal(tokens, _draw(penalise(logits, seen, params.repetition_penalty), keys, plain))
    expected = log_probability(jnp.asarray(logits, jnp.float32), tokens)
    tolerances.assert_close(logprobs, expected, tolerances.rounding("float32", VOCAB), "log-probabilities")


def test_other_parameters_compile_nothing():
    logits, keys = np.zeros((3, 5), np.float32), jax.random.split(jax.random.key(0), 3)
    draw = jax.jit(lambda logits, *args: sample(logits, logits > 0, *args))  # a cache of its own
    for params in (dict(), dict(temperature=0), dict(top_k=2, top_p=0.5, min_p=0.1), dict(top_k=np.array([1, 0, 9]))):
        draw(logits, keys, SamplingParams.for_batch(3, **params))
    assert draw._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", np.nan),
        ("temperature", np.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", 2**31),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", np.nan),
        ("top_p", None),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("min_p", [0.1, 0.2, 0.3]),
        ("top_p", [0.5, 2.0]),
    ],
)
def test_bad_parameters_are_named(name, value):
    with pytest.raises(ConfigError, match=f"^{name} = .*expected"):
        SamplingParams.for_batch(2, **{name: value})
