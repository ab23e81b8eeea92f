"""How far a score could be off because other text, or other problems, might have been drawn."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 9999
LEVEL = 0.95


def mean_interval(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of the groups' means, each group resampled by itself.

    For a comparison pass differences, sample by sample: what two models have in common then cancels.

    Args:
        groups: samples of every group, such as the windows of every domain; at least two samples each.

    Raises:
        ValueError: a group of fewer than two samples.
    """
    if min(map(len, groups)) < 2:
        raise ValueError(f"groups of {', '.join(str(len(group)) for group in groups)} samples; at least 2 are needed")

    def statistic(*samples: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)

    found = bootstrap(
        [np.asarray(group, dtype=float) for group in groups],
        statistic,
        n_resamples=RESAMPLES,
        batch=256,
        confidence_level=LEVEL,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(found.low), float(found.high)
