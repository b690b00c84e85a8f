"""Prompts made ready for the device: checked, and padded to one of a few lengths so that new lengths rarely compile."""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from m3jax.errors import DataError


def length_bucket(length: int, smallest: int = 16) -> int:
    """Returns the size that `length` rounds up to: a power of two or 3/4 of one, and at least `smallest`."""
    power = 1 << (length - 1).bit_length()
    three_quarters = power * 3 // 4
    return max(smallest, three_quarters if length <= three_quarters else power)


def check_prompts(prompt_tokens: ArrayLike | Sequence[Sequence[int]], vocab_size: int) -> list[np.ndarray]:
    """Returns the prompts as one integer array each.

    Args:
      prompt_tokens: [b, l] integers, or b sequences of any lengths.
      vocab_size: ids are in [0, vocab_size).

    Raises:
      DataError: no prompt, an empty one, one that is not integers, or an id outside the vocabulary.
    """
    if not isinstance(prompt_tokens, Sequence):
        prompt_tokens = np.asarray(prompt_tokens)
        if prompt_tokens.ndim != 2:
            raise DataError(f"prompt_tokens has shape {prompt_tokens.shape}: expected [prompts, length].")
    if len(prompt_tokens) == 0:
        raise DataError("prompt_tokens has no rows: expected at least one prompt.")
    return [_check_prompt(f"prompt_tokens[{i}]", np.asarray(row), vocab_size) for i, row in enumerate(prompt_tokens)]


def left_pad(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pads prompts in front, so that all end at the last position.

    Returns:
      tokens [b, l] int32, segment_ids [b, l] int32 (1 on a prompt, 0 on padding), lengths [b] int32; l is a bucket.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    size = length_bucket(int(lengths.max()))
    tokens = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[size - len(prompt) :] = prompt
    segment_ids = (np.arange(size)[None, :] >= size - lengths[:, None]).astype(np.int32)
    return tokens, segment_ids, lengths


def _check_prompt(name: str, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    if tokens.ndim != 1:
        raise DataError(f"{name} = {tokens!r}: expected a sequence of token ids.")
    if tokens.size == 0:
        raise DataError(f"{name} is empty: expected at least one token, for example the tokenizer's BOS.")
    if tokens.dtype.kind not in "iu":
        raise DataError(f"{name} holds {tokens.dtype} values: expected integer token ids.")
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        position = int(outside.argmax())
        raise DataError(
            f"{name}[{position}] = {tokens[position]}: expected a token id in [0, {vocab_size}), the vocabulary of the "
            "model. Was the prompt made with another tokenizer?"
        )
    return tokens
