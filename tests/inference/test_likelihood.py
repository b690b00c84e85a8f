"""Scores of continuations against a direct computation, whatever the batches, for every kind of mixer."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax.config import build_config
from m3jax.errors import DataError
from m3jax.inference import likelihood
from m3jax.inference.likelihood import Continuation, score_continuations
from m3jax.models.language_model import LanguageModel
from tests.tolerances import assert_close, rounding

_WIDTH = 8


@dataclass(frozen=True)
class Sizes:
    vocab_size: int = 61
    padded: int = 64


class SumModel(nn.Module):
    """Sees the running sum of its embeddings, so that a token's place and all before it matter; compiles at once."""

    config: Sizes

    def setup(self):
        self.embedding = self.param("embedding", nn.initializers.normal(1), (self.config.padded, _WIDTH))

    def hidden(self, tokens):
        return jnp.cumsum(self.embedding[tokens], axis=1)

    def logits(self, hidden):
        return jnp.sin(hidden) @ self.embedding.T


@pytest.fixture(scope="module")
def sums():
    model = SumModel(Sizes())
    return model, model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="hidden")["params"]


def in_numpy(params, tokens):
    """The logits of SumModel, [l, V]."""
    embedding = np.asarray(params["embedding"], np.float64)
    return np.sin(np.cumsum(embedding[tokens], axis=0)) @ embedding.T


def random_continuations(vocab_size, spans, seed=0):
    rng = np.random.default_rng(seed)
    return [Continuation(*(rng.integers(vocab_size, size=n).tolist() for n in span)) for span in spans]


def direct(logits_of, continuations, max_length, vocab_size):
    """[(log-likelihood, is greedy)] from the logits of one whole sequence after another."""
    results = []
    for context, tokens in continuations:
        read = [*context, *tokens][-(max_length + 1) :][:-1]
        logits = np.asarray(logits_of(read), np.float64)[len(read) - len(tokens) :]
        log_p = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        greedy = all(logits[i, :vocab_size].argmax() == token for i, token in enumerate(tokens))
        results.append((sum(log_p[i, token] for i, token in enumerate(tokens)), greedy))
    return results


def score(model, params, continuations, max_length=64, batch_tokens=256):
    found = score_continuations(model, params, continuations, max_length=max_length, batch_tokens=batch_tokens)
    return [result for _, result in sorted(found)]


def assert_scores(found, expected, terms):
    assert_close([s.log_likelihood for s in found], [e for e, _ in expected], rounding("float32", terms), "scores")
    assert [s.is_greedy for s in found] == [greedy for _, greedy in expected]


def test_every_kind_of_mixer():
    sizes = {"vocab_size": 61, "d_model": 16, "n_layers": 4, "d_intermediate": 16, "headdim": 8, "d_state": 8}
    sizes |= {"attention_heads": 2, "attention_headdim": 8, "gdn_heads": 2, "gdn_headdim": 8, "gdn_expand_v": 1}
    config = build_config({"model": sizes | {"mixers": "mamba3,attention,mamba2,gated_deltanet", "dtype": "float32"}})
    model = LanguageModel(config.model)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    continuations = random_continuations(61, [(5, 3), (1, 1), (11, 2), (2, 9)])
    logits = jax.jit(model.apply)

    def logits_of(read):  # behind the sequence, other padding than that of the batches
        return logits({"params": params}, np.array([read + [7] * (12 - len(read))], np.int32))[0, : len(read)]

    assert_scores(score(model, params, continuations), direct(logits_of, continuations, 64, 61), terms=4 * 3 * 16 + 9)


@pytest.mark.parametrize(("max_length", "batch_tokens"), [(64, 1), (64, 100), (64, 10_000), (16, 64)])
def test_batches_and_truncation(sums, max_length, batch_tokens, monkeypatch):
    monkeypatch.setattr(likelihood, "_MOST_LOGITS", 16)
    monkeypatch.setattr(likelihood, "_FEWEST_LOGITS", 4)
    model, params = sums
    rng = np.random.default_rng(1)
    continuations = random_continuations(61, [(rng.integers(1, 60), rng.integers(1, 17)) for _ in range(40)])
    expected = direct(lambda read: in_numpy(params, read), continuations, max_length, 61)
    assert_scores(score(model, params, continuations, max_length, batch_tokens), expected, terms=76 * _WIDTH)


def test_greedy_continuations_are_told(sums):
    model, params = sums
    tokens = [3, 14]
    for _ in range(6):
        tokens.append(int(in_numpy(params, tokens)[-1, :61].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % 61]
    scores = score(model, params, [Continuation(t[:2], t[2:]) for t in (tokens, other)])
    assert [s.is_greedy for s in scores] == [True, False]
    assert scores[0].log_likelihood > scores[1].log_likelihood


def test_answers_of_one_token_share_a_row(sums, monkeypatch):
    rows = []
    monkeypatch.setattr(likelihood, "_hidden", lambda *args: rows.append(len(args[2])) or hidden(*args))
    hidden = jax.jit(lambda model, params, tokens: model.apply({"params": params}, tokens, method="hidden").reshape(
        -1, _WIDTH), static_argnums=0)  # fmt: skip
    model, params = sums
    continuations = [Continuation([5, 6, 7], [token]) for token in range(61)]
    scores = score(model, params, continuations)
    assert rows == [1]
    assert sum(s.is_greedy for s in scores) == 1
    # p is over the whole head; what the rows beyond the vocabulary have is missing here.
    logits = in_numpy(params, [5, 6, 7])[-1]
    share = np.exp(logits[:61]).sum() / np.exp(logits).sum()
    assert sum(np.exp(s.log_likelihood) for s in scores) == pytest.approx(share, rel=rounding("float32", 64))


@pytest.mark.parametrize(
    ("continuation", "message"),
    [
        (Continuation([], [1]), r"continuations\[1\].context is empty"),
        (Continuation([1], []), r"continuations\[1\].tokens is empty"),
        (Continuation([1], [61]), r"= 61: expected a token id in \[0, 61\)"),
        (Continuation([1], [1] * 9), r"continuations\[1\] has 9 tokens: expected at most max_length = 8"),
    ],
)
def test_bad_input(sums, continuation, message):
    with pytest.raises(DataError, match=message):
        score(*sums, [Continuation([1], [2]), continuation], max_length=8)


def test_nothing_to_score(sums):
    assert score(*sums, []) == []
