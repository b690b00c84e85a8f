"""Flax Linen modules: mixers, MLP, norm, block and the language model made of them."""
