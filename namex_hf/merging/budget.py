"""How many experts each layer keeps, when all layers share one budget."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

MERGE_TOKENS, LOSS_TOKENS = 16384, 4096
"""Of calibration text, while damage is measured: that merges are made on, and that losses are taken on."""


def tried(experts: int, mean: int) -> list[int]:
    """Numbers of experts to measure, of a layer of so many: every eighth of it, one, and the budget's mean; not all."""
    return sorted({1, mean, *(max(1, experts * part // 8) for part in range(1, 8))} - {experts})


def between(known: Mapping[int, float], experts: int) -> list[float]:
    """The damage of keeping 1 to all experts: linear between the numbers that were measured, and never rising.

    Args:
        known: damage by number, of 1 at least; that of all experts is 0.
    """
    points = sorted({**known, experts: 0.0}.items())
    found = [0.0] * experts
    for (low, at_low), (high, at_high) in pairwise(points):
        for number in range(low, high + 1):
            found[number - 1] = at_low + (at_high - at_low) * (number - low) / (high - low)
    for number in range(experts - 1, 0, -1):
        found[number - 1] = max(found[number - 1], found[number])
    return found


def least_damage(damage: Sequence[Sequence[float]], total: int) -> tuple[int, ...]:
    """Numbers of experts, a layer each, that sum to `total` and do the least damage together; of equals the most even.

    A dynamic programme over layers and what is spent: exact, in ``layers x total x experts`` steps.

    Args:
        damage: of each layer, of keeping 1, 2, ... experts.
        total: from one a layer to all.

    Raises:
        ValueError: it cannot be spent so.
    """
    if not len(damage) <= total <= sum(map(len, damage)):
        raise ValueError(f"total is {total}; accepted: {len(damage)} to {sum(map(len, damage))}")
    best: dict[int, tuple[float, int, tuple[int, ...]]] = {0: (0.0, 0, ())}
    for left, curve in zip(range(len(damage) - 1, -1, -1), damage, strict=True):
        found: dict[int, tuple[float, int, tuple[int, ...]]] = {}
        for spent, (done, uneven, counts) in best.items():
            for number, more in enumerate(curve, start=1):
                if spent + number + left > total:
                    break
                option = (done + more, uneven + number * number, (*counts, number))
                if spent + number not in found or option < found[spent + number]:
                    found[spent + number] = option
        best = found
    return best[total][2]
