"""How many experts each layer keeps, when all layers share one budget."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

MERGE_TOKENS, LOSS_TOKENS = 16384, 4096
"""Calibration tokens for the measurement: for merges, and for losses."""


def candidate_counts(experts: int, mean: int) -> list[int]:
    """Expert counts at which the error is measured: multiples of n/8, 1, and the budget's mean; not all experts."""
    return sorted({1, mean, *(max(1, experts * part // 8) for part in range(1, 8))} - {experts})


def interpolate_error(known: Mapping[int, float], experts: int) -> list[float]:
    """The error with 1 to all experts: linear between the counts that were measured, and never rising.

    Args:
        known: error by expert count, of 1 at least; that of all experts is 0.
    """
    points = sorted({**known, experts: 0.0}.items())
    errors = [0.0] * experts
    for (low, at_low), (high, at_high) in pairwise(points):
        for number in range(low, high + 1):
            errors[number - 1] = at_low + (at_high - at_low) * (number - low) / (high - low)
    for number in range(experts - 1, 0, -1):
        errors[number - 1] = max(errors[number - 1], errors[number])
    return errors


def least_damage(damage: Sequence[Sequence[float]], total: int) -> tuple[int, ...]:
    """Expert counts, one a layer, that sum to `total` and have the least sum of errors; of equals the most even.

    A dynamic programme over layers and experts spent: exact, in ``layers x total x experts`` steps.

    Args:
        damage: of each layer, the error with 1, 2, ... experts.
        total: from one a layer to all.

    Raises:
        ValueError: no counts have this sum.
    """
    if not len(damage) <= total <= sum(map(len, damage)):
        raise ValueError(f"total is {total}; accepted: {len(damage)} to {sum(map(len, damage))}")
    best: dict[int, tuple[float, int, tuple[int, ...]]] = {0: (0.0, 0, ())}
    for left, curve in zip(range(len(damage) - 1, -1, -1), damage, strict=True):
        following: dict[int, tuple[float, int, tuple[int, ...]]] = {}
        for spent, (done, uneven, counts) in best.items():
            for number, more in enumerate(curve, start=1):
                if spent + number + left > total:
                    break
                option = (done + more, uneven + number * number, (*counts, number))
                if spent + number not in following or option < following[spent + number]:
                    following[spent + number] = option
        best = following
    return best[total][2]
