"""Products of a few rows with a weight, and what surrounds them in a step of decoding."""

from .api import few_rows_product

__all__ = ["few_rows_product"]
