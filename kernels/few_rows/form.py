"""What is computed beside the product."""

from typing import NamedTuple


class Form(NamedTuple):
    """Static arguments of `api.few_rows_product`."""

    epsilon: float
    gated: bool
