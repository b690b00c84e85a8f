"""A caller's function that hears of every new token while the compiled decode loop runs."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import io_callback
from jax.typing import ArrayLike

# Takes the step's tokens [b] int32 (-1 in rows that have ended); may return [b] booleans, True to end that row here.
OnTokens = Callable[[np.ndarray], ArrayLike | None]

# The compiled program knows a listener by its number: a function inside would compile it anew for every call.
_listening: dict[int, "Listener"] = {}
_numbers = itertools.count()


class Listener:
    """Calls `on_tokens` while the `with` block runs, and raises at its end what `on_tokens` raised."""

    def __init__(self, on_tokens: OnTokens):
        self._on_tokens = on_tokens
        self._error: BaseException | None = None
        self.number = np.int32(next(_numbers))

    def __enter__(self) -> "Listener":
        _listening[int(self.number)] = self
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, traceback: object) -> None:
        del _listening[int(self.number)]
        if error is None and self._error is not None:
            raise self._error

    def hear(self, tokens: np.ndarray) -> np.ndarray:
        """Returns [b] bool, the rows to end; all of them after an error."""
        # An exception that travels through the compiled program would come out as another type.
        try:
            answer = self._on_tokens(tokens)
            ended = np.zeros(tokens.shape, bool) if answer is None else np.asarray(answer, bool)
            if ended.shape != tokens.shape:
                raise ValueError(
                    f"on_tokens returned shape {ended.shape}: expected None or {tokens.shape}, one per row."
                )
            return ended
        except BaseException as error:
            self._error = error
            return np.ones(tokens.shape, bool)


def tell(number: jax.Array, tokens: jax.Array) -> jax.Array:
    """Inside a compiled program: hands tokens [b] to the listener of that number and returns its answer [b] bool."""
    return io_callback(_hear, jax.ShapeDtypeStruct(tokens.shape, bool), number, tokens)


def _hear(number: jax.Array, tokens: jax.Array) -> np.ndarray:
    return _listening[int(number)].hear(np.asarray(tokens))
