"""Generation: a batch at once, continuous batching, sessions, sampling, and the way from text to text."""

from m3jax.inference.decode import generate
from m3jax.inference.engine import Completion, Engine, Request
from m3jax.inference.session import Session
from m3jax.inference.text import generate_text

__all__ = ["Completion", "Engine", "Request", "Session", "generate", "generate_text"]
