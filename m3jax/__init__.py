"""m3jax: Mamba-3 state space models in JAX."""
