"""The language model: embedding, layers stacked under one scan, final norm, head.

Where a state goes in and comes out (`prefill`, `step`), there is no loop over the layers: it would carry all states as
one array, of which every layer copied its part out and in again.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3jax.config import ModelConfig
from m3jax.errors import ConfigError
from m3jax.kernels import SCAN_RESIDUALS, Sums
from m3jax.kernels.products import enough_rows, operand_dtype
from m3jax.models.block import Block, Period
from m3jax.models.mixers import MIXERS, State
from m3jax.models.norm import RMSNorm

PyTree = Any

_FEW_ROWS = 32
_SCANNED_IN_FLOAT32 = ("b_bias", "c_bias", "d")
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SCAN_RESIDUALS),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LanguageModel(nn.Module):
    """A causal language model. b batch, l length, V = config.padded_vocab_size.

    Parameters of the layers are stacked: every leaf under "layers" has n_layers as its first axis. Where layers have
    different mixers, those of one period of the pattern are apart ("layers/0", "layers/1", ...), and the first axis is
    that of periods. The decode state is a tuple, one mixer's state for each layer, whose arrays all have the batch as
    their first axis. `initial_state` and `separate_layers` are called on the model itself; the other methods through
    `apply`, `prefill`, `step` and `logits` also with the parameters that `separate_layers` returns.
    """

    config: ModelConfig

    def setup(self):
        """Builds the submodules."""
        m = self.config
        if "float64" in (m.dtype, m.param_dtype) and not jax.config.jax_enable_x64:
            raise ConfigError(
                "config.model.dtype = 'float64': JAX has no 64-bit numbers unless JAX_ENABLE_X64=1 is set."
            )
        table = nn.initializers.normal(0.02), (m.padded_vocab_size, m.d_model), m.param_dtype
        self.embedding = self.param("embedding", *table)
        tied = m.tie_embeddings and not self.has_variable("params", "head")  # there is one of separate_layers
        self.head = self.embedding if tied else self.param("head", *table)
        block = Block
        if m.remat != "none":
            # In a loop the compiler cannot undo recomputation by taking it for a common subexpression.
            block = nn.remat(Block, policy=_REMAT_POLICIES[m.remat], prevent_cse=not m.scan_layers)
        periods, alike = m.n_layers // len(m.mixer_pattern), len(m.mixer_pattern) == 1
        self.layers = nn.scan(
            block if alike else Period,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=periods,
            unroll=1 if m.scan_layers else periods,
        )(m, m.mixer_pattern[0] if alike else block)
        self.norm = RMSNorm(jnp.dtype(m.dtype), jnp.dtype(m.param_dtype))

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Logits of the next token at every position: tokens [b, l] → [b, l, V], float32 or better."""
        return self.logits(self.hidden(tokens, segment_ids))

    def hidden(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """What the head sees: tokens [b, l] → [b, l, d_model]; documents (segment_ids [b, l]) do not see each other.

        Raises:
          ValueError: tokens of another number of axes.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tokens.shape}; expected [b, l], as [1, l] for one sequence.")
        x, _ = self.layers(self._embed(tokens), segment_ids, None)
        return self.norm(x)

    def prefill(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        """Like `hidden`, from `state` on, and returns the state after the last token too.

        None as state is the one before any token, with room for these.
        """
        if state is None:
            state = self.initial_state(*tokens.shape)
        x, state = self._layers_in_turn(self._embed(tokens), segment_ids, state)
        return self.norm(x), state

    def step(self, token: jax.Array, state: State) -> tuple[jax.Array, State]:
        """One decode step: token [b] and the state before it → logits [b, V] and the state after it."""
        x, state = self._layers_in_turn(self._embed(token), None, state)
        return self.logits(self.norm(x)), state

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., d_model] → [..., V], float32 or better."""
        accumulator = jnp.promote_types(hidden.dtype, jnp.float32)
        operand = operand_dtype(hidden.dtype)
        head = self.head.astype(operand)

        def product(x: jax.Array) -> jax.Array:
            return jnp.einsum("...d,vd->...v", x, head, preferred_element_type=accumulator)

        return enough_rows(product, hidden.astype(operand))

    def initial_state(self, batch: int, capacity: int) -> State:
        """The state of all layers before the first token of `batch` sequences of at most `capacity` tokens each."""
        m = self.config
        return tuple(MIXERS[self._mixer(i)].initial_state(m, batch, capacity) for i in range(m.n_layers))

    def separate_layers(self, params: PyTree) -> PyTree:
        """The parameters for decoding: those of each layer apart, weights of products as narrow as they are multiplied.

        A slice of a stacked weight, or its conversion, would cost a copy at every token. A tied head that is narrower
        than the embedding is a weight of its own here, and what the scan takes in float32 is in float32: converted at
        every prompt, it would be a launch for each, before there is work for the device. Parameters that are so already
        stay as they are.
        """
        if isinstance(params["layers"], tuple):
            return params

        def convert(path: tuple, v: jax.Array) -> jax.Array:
            if path[-1].key == "kernel":
                return v.astype(self.config.dtype)
            return v.astype(jnp.promote_types(v.dtype, jnp.float32)) if path[-1].key in _SCANNED_IN_FLOAT32 else v

        layers = tuple(self._layer(params["layers"], i) for i in range(self.config.n_layers))
        params = dict(params, layers=jax.tree_util.tree_map_with_path(convert, layers))
        head, operand = params.get("head", params["embedding"]), operand_dtype(jnp.dtype(self.config.dtype))
        return params if operand.itemsize >= head.dtype.itemsize else params | {"head": head.astype(operand)}

    def _layers_in_turn(self, x: jax.Array, segment_ids: jax.Array | None, states: State) -> tuple[jax.Array, State]:
        layers, after = self.variables["params"]["layers"], []
        for i, state in enumerate(states):
            params = layers[i] if isinstance(layers, tuple) else self._layer(layers, i)
            block = Block(self.config, self._mixer(i), parent=None)
            x, state = block.apply({"params": params}, x, segment_ids, state)
            after.append(state)
        return x.added(jnp.dtype(self.config.dtype)) if isinstance(x, Sums) else x, tuple(after)

    def _mixer(self, i: int) -> str:
        return self.config.mixer_pattern[i % len(self.config.mixer_pattern)]

    def _layer(self, stacked: PyTree, i: int) -> PyTree:
        period, place = divmod(i, len(self.config.mixer_pattern))
        return jax.tree.map(lambda v: v[period], stacked[str(place)] if len(self.config.mixer_pattern) > 1 else stacked)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        residual = jnp.promote_types(self.config.dtype, jnp.float32)
        rows = self.embedding.shape[0]
        if rows > _FEW_ROWS:
            return self.embedding[tokens].astype(residual)
        # The gradient is then a product too, not a scatter whose additions wait for each other at the few rows.
        one_hot = jax.nn.one_hot(tokens, rows, dtype=residual)
        return jnp.einsum(
            "...v,vd->...d", one_hot, self.embedding.astype(residual), precision=jax.lax.Precision.HIGHEST
        )
