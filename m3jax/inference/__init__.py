"""Generation: prefill and decoding in one compiled loop, sampling, and the way from text to text."""

from m3jax.inference.decode import generate
from m3jax.inference.text import generate_text

__all__ = ["generate", "generate_text"]
