"""How far counts may stray from their probabilities."""

import numpy as np

# Standard deviations. A right generator strays further in one of 1.7 million counts.
DEVIATIONS = 5


def assert_frequencies(outcomes, probabilities: dict) -> None:
    """Compares the counts of outcomes with their probabilities; outcomes that have none must not occur."""
    values, counts = np.unique(np.asarray(outcomes), return_counts=True)
    counts = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert set(counts) <= set(probabilities), set(counts) - set(probabilities)
    assert abs(sum(probabilities.values()) - 1) < 1e-9
    n = sum(counts.values())
    for outcome, p in probabilities.items():
        bound = DEVIATIONS * np.sqrt(n * p * (1 - p))
        count = counts.get(outcome, 0)
        assert abs(count - n * p) <= bound, f"{outcome}: {count} of {n}, expected {n * p:.1f} ± {bound:.1f}"


def evenly(outcomes) -> dict:
    """Equal probabilities."""
    outcomes = list(outcomes)
    return {outcome: 1 / len(outcomes) for outcome in outcomes}
