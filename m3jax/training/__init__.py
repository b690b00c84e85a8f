"""Training: the optimizer and its schedule, the jitted step, checkpoints, metrics, and the loop that joins them."""
