"""What the recurrence carries from one token to the next."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mamba3State(NamedTuple):
    """State after a token; b batch, h heads, s angles, p head width, n state width, r rank.

    Attributes:
      angle: phase φ in [0, 2π), [b, h, s], float32 or float64.
      ssm: H, [b, h, p, n], float32 or float64 (callers may store it and b narrower).
      b: the token's B after bias and rotation, [b, h, r, n], like ssm.
      x: the token's x before mimo_x, [b, h, p], in the dtype of the input x.
    """

    angle: jax.Array
    ssm: jax.Array
    b: jax.Array
    x: jax.Array

    @classmethod
    def zeros(
        cls, batch: int, heads: int, headdim: int, d_state: int, rank: int, angles: int, x_dtype=jnp.float32
    ) -> "Mamba3State":
        """The state before the first token; accumulators are float64 when `x_dtype` is, else float32."""
        acc = jnp.promote_types(x_dtype, jnp.float32)
        return cls(
            angle=jnp.zeros((batch, heads, angles), acc),
            ssm=jnp.zeros((batch, heads, headdim, d_state), acc),
            b=jnp.zeros((batch, heads, rank, d_state), acc),
            x=jnp.zeros((batch, heads, headdim), x_dtype),
        )

    def accumulating(self, acc: jnp.dtype, x_dtype: jnp.dtype) -> "Mamba3State":
        """In the dtypes of the state after a token: `acc`, and x in that of the inputs."""
        return Mamba3State(*(v.astype(acc) for v in self[:3]), self.x.astype(x_dtype))

    def stored_in(self, ssm_dtype: jnp.dtype, b_dtype: jnp.dtype) -> "Mamba3State":
        """With H and B in these dtypes; a narrow φ would lose the token's turn."""
        return self._replace(ssm=self.ssm.astype(ssm_dtype), b=self.b.astype(b_dtype))
