"""Prompts made ready for the device: checked, and in arrays of a few shapes so that new lengths rarely compile."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from m3jax.errors import DataError

# Of a prefill, if there are enough prompts: under a few hundred, a GPU waits for the weights and more cost nothing.
PREFILL_TOKENS = 1024


class Prefill(NamedTuple):
    """Prompts of similar lengths, read together; r rows, l positions, both the same whenever l is."""

    tokens: np.ndarray  # [r, l] int32, left-padded
    segment_ids: np.ndarray  # [r, l] int32, 1 on a prompt and 0 on padding
    members: list[int]  # which of the prompts these are
    source: list[int]  # the row of each member


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
    return [_check_prompt(f"prompt_tokens[{i}]", np.array(row), vocab_size) for i, row in enumerate(prompt_tokens)]


def plan_prefills(prompts: Sequence[np.ndarray], most_rows: int, tokens: int = PREFILL_TOKENS) -> list[Prefill]:
    """Arranges prompts for prefill: each once, however often it is there, beside those of its bucket of lengths.

    Args:
      prompts: integer arrays, each of at least one token.
      most_rows: of a prefill.
      tokens: of a prefill, which has as many rows as fit, and at least one.
    """
    rows: dict[int, dict[bytes, list[int]]] = {}
    for i, prompt in enumerate(prompts):
        same = rows.setdefault(length_bucket(len(prompt)), {})
        same.setdefault(prompt.astype(np.int32).tobytes(), []).append(i)
    plans = []
    for size, same in sorted(rows.items()):
        n_rows = max(1, min(most_rows, tokens // size))
        groups = list(same.values())
        for first in range(0, len(groups), n_rows):
            group = groups[first : first + n_rows]
            arrays = left_pad([prompts[members[0]] for members in group], n_rows, size)
            source = [row for row, members in enumerate(group) for _ in members]
            plans.append(Prefill(*arrays, [i for members in group for i in members], source))
    return plans


def left_pad(prompts: Sequence[np.ndarray], n_rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts in front, so that all end at the last position, and adds rows of padding.

    Returns:
      tokens [n_rows, size] int32, segment_ids [n_rows, size] int32 (1 on a prompt, 0 on padding).
    """
    tokens, segment_ids = np.zeros((2, n_rows, size), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, size - len(prompt) :] = prompt
        segment_ids[i, size - len(prompt) :] = 1
    return tokens, segment_ids


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
