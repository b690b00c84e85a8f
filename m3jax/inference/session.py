"""One sequence whose state is kept: read on, continued, forked, written to disk and read back."""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn

from m3jax.config import INITIALISATION_KEYS, ModelConfig, from_values
from m3jax.data.atomic import whole_file
from m3jax.errors import CheckpointError, ConfigError
from m3jax.inference.decode import check_max_new_tokens, needs_room, pad_stop_tokens
from m3jax.inference.listener import Listener
from m3jax.inference.prompts import check_prompts, length_bucket
from m3jax.inference.rows import Drawing, Rows, decode, draw, read
from m3jax.inference.sampling import GENERATOR, SamplingParams, check_seed
from m3jax.kernels import one_device

_LONGEST_PIECE = 512  # tokens that are read at one time; shorter pieces are powers of two
_MOST = 256
_FORMAT = "m3jax session 2"
# Keys of the model that decide how it began or how it is computed, not what a state says.
_WITHOUT_INFLUENCE = (
    *INITIALISATION_KEYS, "param_dtype", "chunk_size", "scan_implementation", "remat", "scan_layers"
)  # fmt: skip


class Session:
    """A conversation with a model, of which nothing is read twice.

    Attributes:
      model: what it is a conversation with.
      length: tokens so far, read and drawn.
    """

    def __init__(self, model: nn.Module, params: Any, *, capacity: int | None = None):
        """Starts without any token.

        Args:
          model: as in `m3jax.generate`.
          params: the model's parameters; `model.separate_layers(params)`, so that several sessions have one copy.
          capacity: tokens that there is room for, where the model has attention. Not needed by other models.

        Raises:
          ConfigError: no capacity where one is needed.
        """
        if needs_room(model) and (not isinstance(capacity, int) or capacity < 1):
            raise ConfigError(f"capacity = {capacity!r}: expected an integer of at least 1; the model has attention.")
        self.model, self._params = model, jax.jit(model.separate_layers)(params)
        self._capacity = capacity if needs_room(model) else None
        self._state = model.initial_state(1, self._capacity or 1)
        self._seen = jnp.zeros((1, model.config.vocab_size), bool)
        self._unread: list[int] = []  # the last tokens, which the state does not have yet
        self.length = 0

    def read(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the sequence.

        Raises:
          DataError: tokens that are none, not integers, or outside the vocabulary.
          ConfigError: more than there is room for.
        """
        (tokens,) = check_prompts([tokens], self.model.config.vocab_size)
        self._check_room(len(tokens))
        self._unread += tokens.tolist()
        self.length += len(tokens)

    def generate(
        self,
        *,
        max_new_tokens: int,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
        on_token: Callable[[int], bool | None] | None = None,
        **sampling: float,
    ) -> list[int]:
        """Draws tokens and adds them to the sequence.

        Args:
          max_new_tokens: how many may follow.
          seed: token i of the sequence is drawn with `fold_in(jax.random.key(seed), i)`: the same as `generate` draws.
          stop_tokens: ids after which drawing ends.
          on_token: called with every token as it is drawn; may return True to end with it. After an error of it the
            sequence is the one before the call.
          **sampling: temperature, top_k, top_p, min_p and repetition_penalty of `m3jax.generate`.

        Returns:
          The new tokens.

        Raises:
          ConfigError: a parameter outside its range, no token to follow, or more than there is room for.
        """
        check_max_new_tokens(max_new_tokens)
        check_seed(seed)
        self._check_room(max_new_tokens)
        if not self._unread:
            raise ConfigError("The session is empty: expected at least one token to be read before others are drawn.")
        params = SamplingParams.for_batch(1, **sampling)
        stops = pad_stop_tokens(stop_tokens, self.model.config.vocab_size)[None]
        drawing = Drawing(jax.random.key(seed, impl=GENERATOR)[None], params, stops)
        one = np.ones(1, np.int32)
        with (
            one_device(self._params),
            nullcontext()
            if on_token is None
            else Listener(lambda tokens: [bool(on_token(int(tokens[0])))]) as listener,
        ):
            logits, state, seen = self._read_all()
            rows = Rows((), 0 * one, self.length * one, max_new_tokens * one, seen, drawing)
            rows, first = draw(self.model, logits, rows)
            rows = rows._replace(state=state)
            ended = np.zeros(1, bool) if listener is None else listener.hear(np.asarray(first.tokens))
            number = None if listener is None else listener.number
            most = length_bucket(max_new_tokens, _MOST)
            # Takes the memory of the state that was just read, which nobody else has; the session still has its own.
            rows, more = decode(self.model, self._params, rows, ended, np.int32(max_new_tokens - 1), number, most=most)
            tokens = np.concatenate([first.tokens, more.tokens[:, 0]])
        tokens = tokens[tokens >= 0].tolist()
        self._state, self._seen, self._unread = rows.state, rows.seen, tokens[-1:]
        self.length += len(tokens)
        return tokens

    def fork(self) -> "Session":
        """Another session that goes on from here; nothing that one does is seen by the other."""
        other = object.__new__(Session)
        other.__dict__ |= self.__dict__ | {"_unread": list(self._unread)}
        return other

    def save(self, path: str | Path) -> None:
        """Writes the session to a safetensors file, which is either the old one or the whole new one."""
        tensors = {name: np.asarray(v) for name, v in _named(self._state).items()}
        tensors |= {"seen": np.asarray(self._seen), "unread": np.array(self._unread, np.int32)}
        about = {"format": _FORMAT, "length": str(self.length), "capacity": json.dumps(self._capacity)}
        about |= {"model": json.dumps(asdict(self.model.config)), "weights": self._checksum()}
        with whole_file(Path(path), "wb") as file:
            file.write(safetensors.numpy.save(tensors, about))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, params: Any, *, capacity: int | None = None) -> "Session":
        """Reads a session back.

        Args:
          path: what `save` wrote.
          model: the one that it is a session of.
          params: its parameters, as in `Session`.
          capacity: tokens that there is room for from now on, where the model has attention; None = as many as before.

        Raises:
          CheckpointError: no such file, one that is no session, or one of another model or other weights.
          ConfigError: a capacity that is too small for the tokens so far.
        """
        path = Path(path)
        try:
            with safetensors.safe_open(path, framework="np") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"Cannot read {path}: {error}") from error
        if about.get("format") != _FORMAT:
            raise CheckpointError(f"{path} says format = {about.get('format')!r}: expected {_FORMAT!r}.")
        try:
            config = from_values(ModelConfig, json.loads(about["model"]))
            stored_capacity, session_length = json.loads(about["capacity"]), int(about["length"])
            unread = tensors["unread"]
            _check_meaning(path, config, model.config)
            if len(unread):
                check_prompts([unread], model.config.vocab_size)
            expected = jax.eval_shape(lambda: model.initial_state(1, stored_capacity or 1))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
        _check_shapes(path, tensors, _named(expected), model.config.vocab_size)
        capacity = stored_capacity if capacity is None else capacity
        if needs_room(model) and capacity < session_length:
            raise ConfigError(f"capacity = {capacity}: expected room for the {session_length} tokens that {path} has.")
        session = cls(model, params, capacity=capacity)
        if about.get("weights") != session._checksum():
            raise CheckpointError(f"{path} is a session of other weights: expected those of the model given.")
        leaves, structure = jax.tree.flatten(session._state)
        names = list(_named(session._state))
        session._state = structure.unflatten(
            jnp.asarray(_with_room(tensors[name], leaf.shape)) for name, leaf in zip(names, leaves, strict=True)
        )
        session._seen, session._unread = jnp.asarray(tensors["seen"]), unread.tolist()
        session.length = session_length
        return session

    def _read_all(self) -> tuple[jax.Array, Any, jax.Array]:
        """The logits after the last token, and the state and the tokens seen with all that was unread."""
        state, seen, unread = self._state, self._seen, self._unread
        while unread:
            n = min(_LONGEST_PIECE, 1 << (len(unread).bit_length() - 1))
            piece, unread = np.array([unread[:n]], np.int32), unread[n:]
            logits, state, seen = read(self.model, self._params, state, seen, piece)
        return logits, state, seen

    def _check_room(self, more: int) -> None:
        if self._capacity is not None and self.length + more > self._capacity:
            raise ConfigError(
                f"{more} tokens after {self.length} need room for {self.length + more}: expected at most capacity = "
                f"{self._capacity}; `Session.load` gives a saved session more (--capacity)."
            )

    def _checksum(self) -> str:
        """Of the weights' bits as stored: decoding has some of them wider."""
        sums = jax.device_get(_bit_sums(self._params, self.model.config.param_dtype))
        return hashlib.sha256(repr(jax.tree.map(int, sums)).encode()).hexdigest()


def _named(state: Any) -> dict[str, jax.Array]:
    """Its arrays by names such as state/3/ssm."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    parts = (
        (["state", *(str(getattr(key, "name", getattr(key, "idx", key))) for key in path)], v) for path, v in leaves
    )
    return {"/".join(names): v for names, v in parts}


def _check_shapes(
    path: Path, tensors: dict[str, np.ndarray], state: dict[str, jax.ShapeDtypeStruct], vocab_size: int
) -> None:
    expected = state | {"seen": jax.ShapeDtypeStruct((1, vocab_size), bool)}
    if missing := sorted(expected.keys() ^ (tensors.keys() - {"unread"})):
        raise CheckpointError(f"{path}: {missing[0]} is in the file or in the model alone.")
    for name, v in expected.items():
        if tensors[name].shape != v.shape or tensors[name].dtype != v.dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensors[name].dtype} {tensors[name].shape}: expected {v.dtype} {v.shape}."
            )


def _with_room(v: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array of a state as one of another capacity: without what is beyond it, or with zeros."""
    v = v[tuple(map(slice, shape))]
    return np.pad(v, [(0, whole - part) for whole, part in zip(shape, v.shape, strict=True)])


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """The keys of the config that decide what a state says, with the same value for all ways to write it."""
    values = {key: value for key, value in asdict(config).items() if key not in _WITHOUT_INFLUENCE}
    pattern = itertools.islice(itertools.cycle(config.mixer_pattern), config.n_layers)
    built = {"mixers": tuple(pattern), "d_intermediate": config.d_mlp, "attention_kv_heads": config.n_kv_heads}
    return values | built


def _check_meaning(path: Path, stored: ModelConfig, own: ModelConfig) -> None:
    meaning = _meaning(stored)
    for key, value in _meaning(own).items():
        if meaning[key] != value:
            raise CheckpointError(
                f"{path} is a session of another model: {key} = {getattr(stored, key)!r}, expected "
                f"{getattr(own, key)!r}."
            )


@functools.partial(jax.jit, static_argnames="dtype")
def _bit_sums(params: Any, dtype: str) -> Any:
    """Of each array a hash of its numbers' bits and places, those of numbers no wider than `dtype`, uint32."""

    def bits(v: jax.Array) -> jax.Array:
        v = v.astype(dtype) if v.dtype.itemsize > jnp.dtype(dtype).itemsize else v
        words = jax.lax.bitcast_convert_type(v, f"uint{8 * min(v.dtype.itemsize, 4)}").astype(jnp.uint32).ravel()
        words = (words ^ (words >> 15)) * jnp.uint32(0x85EBCA6B)  # or two changed signs would cancel
        words ^= words >> 13
        return jnp.sum(words * (2 * jax.lax.iota(jnp.uint32, words.size) + 1), dtype=jnp.uint32)

    return jax.tree.map(bits, params)
