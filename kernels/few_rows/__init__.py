"""Products of few rows with a weight, and what surrounds them in a step of decoding."""

from .api import add_and_norm, few_rows_product
from .sums import Sums

__all__ = ["Sums", "add_and_norm", "few_rows_product"]
