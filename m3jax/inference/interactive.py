"""A conversation at the keyboard: a line is read, the model goes on, and its state stays for the next line."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from m3jax.data.tokenizer import Tokenizer
from m3jax.inference.session import Session
from m3jax.inference.text import ContinuedText, check_texts, check_tokenizer


def converse(
    session: Session,
    tokenizer: Tokenizer,
    lines: Iterable[str],
    write: Callable[[str], None],
    *,
    stop: Sequence[str] = (),
    after_turn: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    """Reads line after line and continues each.

    The sequence is one text: the lines with their line breaks and what was drawn, EOS included where it ended a turn.
    The tokenizer's BOS, if it has one, comes before the first line.

    Args:
      session: what is continued; it may have tokens already.
      tokenizer: the one the model was trained with.
      lines: with their line breaks.
      write: is given the new text as soon as it is certain, and a line break after each turn.
      stop: strings that end a turn; not written, but read by the model.
      after_turn: called after every turn.
      **options: max_new_tokens, seed and the sampling parameters of `Session.generate`.

    Raises:
      ConfigError: a parameter outside its range, or more tokens than the session has room for.
    """
    check_texts("stop", stop)
    check_tokenizer(tokenizer, session.model)
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for line in lines:
        tokens = tokenizer.encode(line).tolist()
        if session.length == 0 and tokenizer.bos_id is not None:
            tokens = [tokenizer.bos_id, *tokens]
        if not tokens:
            continue
        session.read(tokens)
        text = ContinuedText(tokenizer, tokens, stop)

        def add(token: int, text: ContinuedText = text) -> bool:
            if token != tokenizer.eos_id:
                write(text.add(token))
            return text.stopped

        session.generate(stop_tokens=ends, on_token=add, **options)
        write(text.finish())
        write("\n")
        after_turn()


def what_ends_a_turn(tokenizer: Tokenizer, max_new_tokens: int, stop: Sequence[str]) -> str:
    """A sentence for whoever is at the keyboard."""
    ends = [f"after {max_new_tokens} tokens"]
    ends += [] if tokenizer.eos_id is None else ["at the end of a text"]
    ends += ["at " + " or ".join(map(repr, stop))] if stop else []
    hint = ""
    if tokenizer.eos_id is None and not stop:
        hint = f" The tokenizer {tokenizer.name!r} has no token for the end of a text: consider --stop."
    return f"A turn ends {', '.join(ends)}.{hint} Ctrl-D ends the conversation."


def typed_lines(prompt: str = "> ") -> Iterator[str]:
    """Lines from the keyboard, or from what stands in for it, until they end."""
    while True:
        try:
            yield input(prompt) + "\n"
        except EOFError:
            return
