"""Learning-rate schedules: a linear warm-up from zero, then cosine, WSD or constant, over `train.steps` steps."""

import optax

from m3jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Builds the learning rate as a function of the step.

    Steps count from 1: the last step of the warm-up uses the peak, step `steps` the final learning rate (cosine, wsd).

    Args:
      config: the schedule's name and its numbers.
      steps: length of the whole schedule, `train.steps`.

    Returns:
      A function from the step, an int or an int32 scalar, to the learning rate.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    warmup_steps = round(config.warmup_fraction * steps)
    rest = max(steps - warmup_steps, 1)
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=final / peak)
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay = min(max(round(config.decay_fraction * steps), 1), rest)
        after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    return optax.join_schedules([warmup, after], [warmup_steps])
