"""Continuous batching: requests enter a running batch as places become free, and leave it one by one.

The device runs blocks of steps. The host starts the next block before it reads the one before, so that the device does
not wait while tokens are handed out; a request that ended on its own ends on the device too, and one that its caller
ends draws at most two blocks in vain.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from m3jax.errors import ConfigError
from m3jax.inference.decode import check_max_new_tokens, enter, needs_room, pad_stop_tokens
from m3jax.inference.prompts import PREFILL_TOKENS, check_prompts, length_bucket, plan_prefills
from m3jax.inference.rows import NO_TOKEN, Drawing, Drawn, decode, empty_rows
from m3jax.inference.sampling import GENERATOR, SamplingParams, check_seed
from m3jax.kernels import one_device

_STOP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue and how; the sampling parameters are those of `m3jax.generate`.

    Attributes:
      prompt: token ids, at least one. Waiting requests with the same prompt share its prefill.
      max_new_tokens: how many tokens may follow.
      seed: decides what is drawn, in [0, 2^32); requests with the same prompt need different ones to differ.
      stop_tokens: ids that end the request; they are part of the result. At most 8.
      on_token: called with every token and its log-probability as they arrive; may return True to end the request
        with this token. What it raises ends the request and is raised by `Engine.step`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_tokens: Sequence[int] = ()
    on_token: Callable[[int, float], bool | None] | None = None


@dataclasses.dataclass
class Completion:
    """What a request has drawn so far.

    Attributes:
      tokens: the new ones alone.
      logprobs: of each token, by the model itself, whatever temperature, filters and penalty did.
      reason: what ended it: "length", "stop_token" or "on_token"; None while it runs.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: str | None = None


@dataclasses.dataclass(eq=False)
class _Running:
    number: int
    request: Request
    completion: Completion = dataclasses.field(default_factory=Completion)
    left: int = 0  # tokens that it may gain in blocks not started yet


class Engine:
    """A batch of `slots` requests at a time; as many more as come wait for their turn.

    A request's tokens and log-probabilities depend on nothing but itself and the engine's sizes: alone or in a crowd,
    whatever ran in its slot before.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        *,
        slots: int,
        capacity: int | None = None,
        block: int = 16,
        prefill_tokens: int = PREFILL_TOKENS,
    ):
        """Makes the batch on the device.

        Args:
          model: as in `m3jax.generate`.
          params: the model's parameters; the engine has a copy, made ready for decoding.
          slots: how many requests run at one time.
          capacity: tokens that a slot has room for, where the model has attention: a prompt, rounded up to the next
            size of prefill, and what follows it. Not needed by other models.
          block: steps between two moments at which requests enter and tokens are handed out.
          prefill_tokens: of the prompts read in one go, padding included. More is faster where many short prompts wait,
            and slower where one does.

        Raises:
          ConfigError: a size that is no integer of at least 1, or no capacity where one is needed.
        """
        sizes = {"slots": slots, "block": block, "prefill_tokens": prefill_tokens}
        for name, value in (sizes if capacity is None else sizes | {"capacity": capacity}).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} = {value!r}: expected an integer of at least 1.")
        if not needs_room(model):
            capacity = None
        elif capacity is None:
            raise ConfigError("capacity = None: expected the tokens that a slot has room for; the model has attention.")
        self._model, self._capacity, self._block, self._prefill_tokens = model, capacity, block, prefill_tokens
        self._params = jax.jit(model.separate_layers)(params)
        self._rows = empty_rows(model, slots, capacity or 1, _STOP_TOKENS)
        self._waiting: collections.deque[_Running] = collections.deque()
        self._slots: list[_Running | None] = [None] * slots
        self._unread: collections.deque[tuple[Drawn, list[_Running | None]]] = collections.deque()
        self._done: dict[int, Completion] = {}
        self._numbers = 0

    def submit(self, request: Request) -> int:
        """Queues a request.

        Returns:
          Its number, by which `step` and `run` name it.

        Raises:
          ConfigError: a parameter outside its range, or more tokens than a slot has room for.
          DataError: a prompt that is empty, not integers, or has a token outside the vocabulary.
        """
        check_max_new_tokens(request.max_new_tokens)
        check_seed(request.seed)
        (prompt,) = check_prompts([request.prompt], self._model.config.vocab_size)
        _sampling([request])
        if len(request.stop_tokens) > _STOP_TOKENS:
            raise ConfigError(f"stop_tokens holds {len(request.stop_tokens)} ids: expected at most {_STOP_TOKENS}.")
        pad_stop_tokens(request.stop_tokens, self._model.config.vocab_size)
        needed = length_bucket(len(prompt)) + request.max_new_tokens
        if self._capacity is not None and needed > self._capacity:
            raise ConfigError(
                f"A prompt of {len(prompt)} tokens, rounded up to {length_bucket(len(prompt))}, and max_new_tokens = "
                f"{request.max_new_tokens} need room for {needed}: expected at most capacity = {self._capacity}."
            )
        own = dataclasses.replace(request, prompt=prompt, stop_tokens=tuple(request.stop_tokens))
        self._waiting.append(_Running(self._numbers, own))
        self._numbers += 1
        return self._waiting[-1].number

    def step(self) -> dict[int, Completion]:
        """Lets waiting requests enter, starts a block of steps and hands out the tokens of the one before.

        Returns:
          The requests that have ended, by number. After an error of an `on_token`, the next call returns them.
        """
        with one_device(self._params):
            self._admit()
            busy = any(self._slots)
            if busy:
                ended = np.array([running is None for running in self._slots])
                self._rows, drawn = decode(
                    self._model, self._params, self._rows, ended, np.int32(self._block), None, most=self._block
                )
                self._unread.append((drawn, list(self._slots)))
                self._leave_by_length()
        errors = []
        while len(self._unread) > busy:
            errors += self._hand_out(*self._unread.popleft())
        if errors:
            raise errors[0]
        done, self._done = self._done, {}
        return done

    def run(self) -> dict[int, Completion]:
        """Steps until all requests have ended; returns them by number."""
        done = {}
        try:
            while self._waiting or any(self._slots) or self._unread or self._done:
                done |= self.step()
        except BaseException:
            self._done |= done  # for the next call
            raise
        return done

    def _admit(self) -> None:
        free = [slot for slot, running in enumerate(self._slots) if running is None]
        entering = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        if not entering:
            return
        requests = [running.request for running in entering]
        seeds = np.zeros(len(self._slots), np.uint32)  # always as many: an array of another shape would compile
        seeds[: len(requests)] = [request.seed for request in requests]
        drawing = Drawing(
            jax.vmap(partial(jax.random.key, impl=GENERATOR))(seeds),
            _sampling(requests),
            np.stack([pad_stop_tokens(request.stop_tokens, self._model.config.vocab_size) for request in requests]),
        )
        lengths = [request.max_new_tokens for request in requests]
        prompts = [request.prompt for request in requests]
        for plan in plan_prefills(prompts, len(self._slots), self._prefill_tokens):
            slots = [free[i] for i in plan.members]
            self._rows, first = enter(self._model, self._params, self._rows, plan, slots, drawing, lengths)
            members = [entering[i] for i in plan.members]
            for slot, running in zip(slots, members, strict=True):
                self._slots[slot] = running
                running.left = running.request.max_new_tokens - 1
            self._unread.append((first, members))

    def _leave_by_length(self) -> None:
        """Frees the slots of requests that the block just started brings to their length: no need to read it first."""
        for slot, running in enumerate(self._slots):
            if running is not None:
                running.left -= self._block
                if running.left <= 0:
                    self._slots[slot] = None

    def _hand_out(self, drawn: Drawn, whose: list[_Running | None]) -> list[BaseException]:
        """Gives tokens [b] or [steps, b] to their requests, and frees the slots of those that end; returns errors."""
        errors = []
        columns = (np.atleast_2d(np.asarray(v)).T.tolist() for v in drawn)
        for running, tokens, logprobs in zip(whose, *columns, strict=False):  # a prefill has fewer
            if running is None or running.completion.reason is not None:
                continue
            for token, logprob in zip(tokens, logprobs, strict=True):
                if token == NO_TOKEN:
                    break
                try:
                    running.completion.reason = _take(running, token, logprob)
                except BaseException as error:
                    running.completion.reason = "on_token"
                    errors.append(error)
                if running.completion.reason is not None:
                    if running in self._slots:
                        self._slots[self._slots.index(running)] = None
                    self._done[running.number] = running.completion
                    break
        return errors


def _take(running: _Running, token: int, logprob: float) -> str | None:
    """Adds a token; returns why the request ends with it, None if it does not."""
    request, completion = running.request, running.completion
    completion.tokens.append(token)
    completion.logprobs.append(logprob)
    if request.on_token is not None and request.on_token(token, logprob):
        return "on_token"
    if token in request.stop_tokens:
        return "stop_token"
    return "length" if len(completion.tokens) == request.max_new_tokens else None


def _sampling(requests: Sequence[Request]) -> SamplingParams:
    names = SamplingParams._fields
    columns = {name: [getattr(request, name) for request in requests] for name in names}
    return SamplingParams.for_batch(len(requests), **columns)
