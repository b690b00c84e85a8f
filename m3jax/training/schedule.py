"""Learning-rate schedules: a linear warm-up from zero, then cosine, WSD or constant, over `train.steps` steps."""

import optax

from m3jax.config import OptimizerConfig
from m3jax.errors import ConfigError


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Builds the learning rate as a function of the step.

    Steps count from 1: step `warmup_steps` uses the peak and step `steps` the final learning rate (cosine, wsd).

    Args:
      config: the schedule's name and its numbers.
      steps: length of the whole schedule, `train.steps`.

    Returns:
      A function from the step, an int or an int32 scalar, to the learning rate.

    Raises:
      ConfigError: a WSD schedule whose warm-up and decay overlap.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    rest = max(steps - config.warmup_steps, 1)
    warmup = optax.linear_schedule(0.0, peak, max(config.warmup_steps, 1))
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=final / peak)
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay = max(round(config.decay_fraction * steps), 1)
        if config.warmup_steps + decay > steps:
            raise ConfigError(
                f"config.optimizer.decay_fraction = {config.decay_fraction}: the decay of {decay} steps and the "
                f"warm-up of {config.warmup_steps} do not fit in train.steps = {steps}; lower one."
            )
        after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    return optax.join_schedules([warmup, after], [config.warmup_steps])
