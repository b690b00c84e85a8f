"""AdamW: clipping by the global norm, Adam's direction and decoupled weight decay on the matrices only.

The learning rate is not part of the optimizer: the step multiplies by it, so that a skipped step does not delay the
schedule (optax counts only the updates that were applied).
"""

from typing import Any

import jax
import optax

from m3jax.config import OptimizerConfig

PyTree = Any

_DECAYED = ("kernel", "embedding", "head")
_DECAYED_ON_REQUEST = ("b_bias", "c_bias", "mimo_x", "mimo_z", "mimo_o")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Builds the transformation from gradients to the direction that the learning rate multiplies."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(
            config.weight_decay, lambda params: decay_mask(params, config.decay_bc_bias_and_mimo)
        ),
    )


def decay_mask(params: PyTree, bc_bias_and_mimo: bool) -> PyTree:
    """Says which parameters decay: projection matrices and the embedding; never step sizes, skips or norm scales.

    Args:
      params: the parameters, nested dicts.
      bc_bias_and_mimo: whether the biases of B and C and the MIMO weights decay too.

    Returns:
      The same tree with a bool per parameter.
    """
    decayed = _DECAYED + (_DECAYED_ON_REQUEST if bc_bias_and_mimo else ())
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in decayed, params)
