"""All statistics of scores: means, standard errors, bootstrap intervals, and comparisons of two models on equal items.

Items are losses in nats, whose mean is reported as a perplexity, or 1 and 0 for right and wrong answers, reported in
per cent. They come in groups, such as the windows of each text; every group has the same weight. In a comparison the
items are the differences of two models, item by item, so that what both find hard cancels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

Groups = Sequence[Sequence[float]]
RESAMPLES = 9999
LEVEL = 0.95
NOISE = 0.05
"""A p-value from which on a difference is called noise."""
TEXT_TOKENS = 4096
"""Tokens of each domain of the packaged held-out text."""
SHARE = "problems"
"""The measure whose items are right or wrong answers; the items of all others are losses."""
MEASURES = {
    "chats": "perplexity of the assistant's turns in held-out chats",
    "text": f"perplexity of packaged held-out text, the first {TEXT_TOKENS} tokens of each domain",
    SHARE: "held-out word problems answered exactly, in per cent",
}
"""What is measured before and after training."""


def mean_of(groups: Groups) -> float:
    """The mean of the groups' means."""
    return fmean(map(fmean, groups))


def changes(groups: Groups, other: Groups) -> list[list[float]]:
    """The items of `groups` less those of `other`, group by group.

    Raises:
        ValueError: other numbers of items.
    """
    return [[new - old for new, old in zip(*pair, strict=True)] for pair in zip(groups, other, strict=True)]


def error_of(groups: Groups) -> float | None:
    """Standard error of `mean_of`; None where a group has a single item."""
    if min(map(len, groups), default=0) < 2:
        return None
    return math.sqrt(sum(float(np.var(group, ddof=1)) / len(group) for group in groups)) / len(groups)


def mean_interval(groups: Groups, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `mean_of`, with each group resampled by itself.

    Args:
        groups: at least two items each.

    Raises:
        ValueError: a group of fewer than two items.
    """
    if min(map(len, groups)) < 2:
        raise ValueError(f"groups of {', '.join(str(len(group)) for group in groups)} samples; at least 2 are needed")
    from scipy.stats import bootstrap

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


@dataclass(frozen=True)
class Estimate:
    """A mean over items, beside the original's on the same items."""

    value: float
    difference: float | None = None
    """To the original's; None of the original."""
    stderr: float | None = None
    """Standard error of `difference`, from the items' differences; None where a group has a single item."""


def estimate(groups: Groups, original: Groups | None = None) -> Estimate:
    """`mean_of` the items, paired with the original's.

    Raises:
        ValueError: other numbers of items.
    """
    if original is None:
        return Estimate(mean_of(groups))
    differences = changes(groups, original)
    return Estimate(mean_of(groups), mean_of(differences), error_of(differences))


# Figures of a measure: a perplexity and ratios of it, or per cent and points


def _figure(measure: str, mean: float) -> float:
    return 100 * mean if measure == SHARE else math.exp(mean)


def value(measure: str, groups: Groups) -> float:
    """The figure of a measure: a perplexity (geometric mean over groups), or per cent."""
    return _figure(measure, mean_of(groups))


def standard_error(measure: str, groups: Groups | None) -> float | None:
    """Of `value`, for a perplexity by the delta method; None where there are too few items."""
    error = error_of(groups) if groups else None
    if groups is None or error is None:
        return None
    return error * (100 if measure == SHARE else value(measure, groups))


def difference(measure: str, groups: Groups, other: Groups) -> dict[str, float]:
    """Of two models on the same items, with a 95 % interval over items (paired bootstrap).

    Returns:
        ``value``, ``low``, ``high``: for perplexities the ratio, for problems the difference in points.
    """
    change = changes(groups, other)
    low, high = mean_interval(change)
    return {"value": value(measure, change), "low": _figure(measure, low), "high": _figure(measure, high)}


def differs(measure: str, interval: Mapping[str, float]) -> bool:
    """Whether the interval excludes equality of the models."""
    return not interval["low"] <= _figure(measure, 0.0) <= interval["high"]


def perplexity_change(before: Groups, after: Groups) -> dict[str, float]:
    """Perplexities ``before`` and ``after``, and standard errors of them and of their ratio, paired by windows.

    Args:
        before, after: for each text the losses of its windows in nats.

    Returns:
        Without ``before_stderr``, ``after_stderr`` and ``ratio_stderr`` where a text has a single window.
    """
    results = {"before": value("text", before), "after": value("text", after)}
    for name, groups in (("before", before), ("after", after), ("ratio", changes(after, before))):
        error = standard_error("text", groups)
        if error is not None:
            results[f"{name}_stderr"] = error
    return results


# One group of items, with a test


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


def paired(model: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare item by item. The p-value of right and wrong answers is McNemar's, of other scores that of the t-test.

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
    low, high = mean_interval([change.tolist()]) if change.any() else (0.0, 0.0)
    binary = bool(np.isin(new, (0, 1)).all() and np.isin(old, (0, 1)).all())
    return Difference(
        float(change.mean()),
        float(change.std(ddof=1) / math.sqrt(len(change))),
        low,
        high,
        mcnemar(higher, lower) if binary else _t(new, old),
        "mcnemar" if binary else "t",
        higher,
        lower,
    )


def mcnemar(higher: int, lower: int) -> float:
    """Exact two-sided p-value: under equal models each disagreement falls to either side with 1/2."""
    from scipy.stats import binomtest

    return 1.0 if higher + lower == 0 else float(binomtest(higher, higher + lower).pvalue)


def _t(new: np.ndarray, old: np.ndarray) -> float:
    from scipy.stats import ttest_rel

    change = new - old
    if np.ptp(change) == 0:  # no spread to measure the difference by
        return 1.0 if change[0] == 0 else 0.0
    return float(ttest_rel(new, old).pvalue)
