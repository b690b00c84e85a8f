"""Documents packed into one sequence."""

import jax
import jax.numpy as jnp


def continues_document(segment_ids: jax.Array) -> jax.Array:
    """Whether each token belongs to the document of the token before it, [b, l]; the first one does."""
    return jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def number_documents(segment_ids: jax.Array) -> jax.Array:
    """Numbers from 0 up, [b, l]: one more wherever the ids change."""
    return jnp.cumsum(~continues_document(segment_ids), axis=1, dtype=jnp.int32)
