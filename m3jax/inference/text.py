"""Generation from text to text: tokens turned into characters as they arrive, and stop strings."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from m3jax.data.tokenizer import Tokenizer
from m3jax.errors import ConfigError, DataError
from m3jax.inference.decode import generate
from m3jax.inference.rows import NO_TOKEN

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes the first bytes of a character to


def generate_text(
    model: nn.Module,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    **options: Any,
) -> list[str]:
    """Continues texts.

    The tokenizer's BOS, if it has one, is put in front of each prompt; its EOS ends a text.

    Args:
      model: a language model.
      params: the model's parameters.
      tokenizer: the one the model was trained with.
      prompts: the texts to continue.
      stop: strings that end a text; the first to be complete does, and is not part of the text.
      on_text: called with a prompt's number and new text of its continuation as soon as the text is certain: whole
        characters, and nothing that may turn out to be the start of a stop string.
      **options: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty and key of `m3jax.generate`.

    Returns:
      The new text of each prompt, the prompt not included. A character cut off by max_new_tokens is left out.

    Raises:
      ConfigError: a parameter outside its range, an empty stop string, or a tokenizer larger than the vocabulary.
      DataError: a prompt without tokens.
    """
    check_texts("prompts", prompts)
    check_texts("stop", stop)
    check_tokenizer(tokenizer, model)
    prompt_tokens = [_encode(tokenizer, i, prompt) for i, prompt in enumerate(prompts)]
    texts = [ContinuedText(tokenizer, tokens, stop) for tokens in prompt_tokens]

    def emit(row: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(row, piece)

    def add_tokens(tokens: np.ndarray) -> list[bool]:
        for row, token in enumerate(tokens):
            if token not in (NO_TOKEN, tokenizer.eos_id):
                emit(row, texts[row].add(int(token)))
        return [text.stopped for text in texts]

    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if stop or on_text is not None:
        generate(model, params, prompt_tokens, stop_tokens=ends, on_tokens=add_tokens, **options)
    else:  # nothing to hear of before the end, so the device need not wait for the host at every token
        for tokens in generate(model, params, prompt_tokens, stop_tokens=ends, **options).T:
            add_tokens(tokens)
    for row, text in enumerate(texts):
        emit(row, text.finish())
    return [text.text for text in texts]


def check_tokenizer(tokenizer: Tokenizer, model: nn.Module) -> None:
    """Raises ConfigError if the tokenizer has tokens that the model does not."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"Tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: "
            "expected the tokenizer the model was trained with."
        )


class ContinuedText:
    """The text of the tokens that continue a prompt, in pieces that are certain when they are given out."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        """Starts after `prompt`: many tokenizers write a token differently at the start of a text than within it."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens = list(prompt)  # the last of the decoded tokens, for context, and then the undecoded ones
        self._n_decoded = len(self._tokens)
        self._held_back = ""  # the start of a stop string, perhaps
        self.text = ""  # given out so far
        self.stopped = False  # a stop string has appeared

    def add(self, token: int) -> str:
        """Returns the text that has become certain with this token; '' if none has."""
        self._tokens.append(token)
        new = self._undecoded()
        # A decoder writes U+FFFD for a character of which bytes are missing: the next token may bring them.
        if not new or new.endswith(_UNFINISHED):
            return ""
        self._tokens = self._tokens[self._n_decoded :]
        self._n_decoded = len(self._tokens)
        return self._give_out(new)

    def finish(self) -> str:
        """Returns the text held back so far: no more tokens will come."""
        if self.stopped:
            return ""
        rest = self._give_out(self._undecoded().rstrip(_UNFINISHED))
        if self.stopped:
            return rest
        held_back, self._held_back = self._held_back, ""
        self.text += held_back
        return rest + held_back

    def _undecoded(self) -> str:
        before = self._tokenizer.decode(self._tokens[: self._n_decoded])
        return self._tokenizer.decode(self._tokens)[len(before) :]

    def _give_out(self, new: str) -> str:
        candidate = self._held_back + new
        found = [(start + len(stop), start) for stop in self._stop if (start := candidate.find(stop)) >= 0]
        if found:
            _, start = min(found)  # the one complete first, however the text was cut into tokens
            certain, self._held_back, self.stopped = candidate[:start], "", True
        else:
            n_held = max((_overlap(candidate, stop) for stop in self._stop), default=0)
            certain, self._held_back = candidate[: len(candidate) - n_held], candidate[len(candidate) - n_held :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that is a start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _encode(tokenizer: Tokenizer, i: int, prompt: str) -> list[int]:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens = bos + tokenizer.encode(prompt).tolist()
    if not tokens:
        raise DataError(f"prompt {i} = {prompt!r} has no tokens: expected at least one character.")
    return tokens


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raises ConfigError for what is no list of texts, and for an empty stop string."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{name} = {texts!r}: expected a list of texts.")
    if name == "stop" and "" in texts:
        raise ConfigError("stop holds '': expected texts of at least one character.")
