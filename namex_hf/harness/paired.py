"""Two models on the same items: is the difference more than the noise of having drawn these items?

Per item the difference of the two scores; what both find easy or hard cancels. For answers that are right or wrong the
p-value is McNemar's, exact (binomial over the items on which the two disagree); else that of the paired t-test.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, ttest_rel

from ..scoring.intervals import mean_interval

NOISE = 0.05
"""A p-value from which on a difference is called noise."""


@dataclass(frozen=True)
class Difference:
    """Of a model's score to that of the model it is compared with, in the score's own unit."""

    mean: float
    stderr: float
    """Standard error of the mean, from the items' differences."""
    low: float
    high: float
    """95 % bootstrap interval: items resampled, both models' answers together."""
    p: float
    test: str
    """``mcnemar`` (exact, two-sided) or ``t`` (paired, two-sided)."""
    higher: int
    lower: int
    """Items on which the model's score is above, and below, the other's."""

    @property
    def is_noise(self) -> bool:
        return self.p >= NOISE


def difference(model: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare item by item.

    Args:
        model, baseline: scores of the same items in the same order, at least two.

    Raises:
        ValueError: other lengths, or fewer than two items.
    """
    if len(model) != len(baseline) or len(model) < 2:
        raise ValueError(f"{len(model)} and {len(baseline)} items; needed: the same, at least 2")
    new, old = np.asarray(model, dtype=float), np.asarray(baseline, dtype=float)
    change = new - old
    higher, lower = int((change > 0).sum()), int((change < 0).sum())
    least, most = mean_interval([change.tolist()]) if change.any() else (0.0, 0.0)
    binary = bool(np.isin(new, (0, 1)).all() and np.isin(old, (0, 1)).all())
    return Difference(
        float(change.mean()),
        float(change.std(ddof=1) / math.sqrt(len(change))),
        least,
        most,
        mcnemar(higher, lower) if binary else _t(new, old),
        "mcnemar" if binary else "t",
        higher,
        lower,
    )


def mcnemar(higher: int, lower: int) -> float:
    """Exact two-sided p-value: under equal models each disagreement falls to either side with 1/2."""
    return 1.0 if higher + lower == 0 else float(binomtest(higher, higher + lower).pvalue)


def _t(new: np.ndarray, old: np.ndarray) -> float:
    change = new - old
    if np.ptp(change) == 0:  # no spread to measure the difference by
        return 1.0 if change[0] == 0 else 0.0
    return float(ttest_rel(new, old).pvalue)
