"""Attention of a new token to a cache of keys and values."""

from .api import cached_attention_step

__all__ = ["cached_attention_step"]
