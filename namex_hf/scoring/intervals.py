"""Confidence intervals of scores over the draw of texts or problems."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 9999
LEVEL = 0.95


def mean_interval(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of the groups' means, with each group resampled by itself.

    For a comparison pass differences, sample by sample: the common part of two models then cancels.

    Args:
        groups: samples of every group, such as the windows of every domain; at least two samples each.

    Raises:
        ValueError: a group of fewer than two samples.
    """
    if min(map(len, groups)) < 2:
        raise ValueError(f"groups of {', '.join(str(len(group)) for group in groups)} samples; at least 2 are needed")

    def statistic(*samples: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)

    interval = bootstrap(
        [np.asarray(group, dtype=float) for group in groups],
        statistic,
        n_resamples=RESAMPLES,
        batch=256,
        confidence_level=LEVEL,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(interval.low), float(interval.high)
