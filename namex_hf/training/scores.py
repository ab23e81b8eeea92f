"""Scores of a model before and after training, item by item, and comparison of two models."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..scoring.arithmetic import exact_answers, held_out_problems
from ..scoring.intervals import mean_interval
from ..scoring.labelled import labelled_losses
from ..scoring.perplexity import held_out_texts, text_losses

TEXT_TOKENS = 4096
"""Tokens of each domain of the packaged held-out text."""
MEASURES = {
    "chats": "perplexity of the assistant's turns in held-out chats",
    "text": f"perplexity of packaged held-out text, the first {TEXT_TOKENS} tokens of each domain",
    "problems": "held-out word problems answered exactly, in per cent",
}
Items = dict[str, list[list[float]]]
"""Groups of items by measure: losses in nats, or 1 for a right response and 0 for a wrong response."""


def measure(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], measures: Sequence[str]) -> Items:
    """Score a model.

    Args:
        rows: held-out chats from the trainer, ``input_ids`` and ``labels``.
        measures: names in `MEASURES`.
    """
    items: Items = {}
    side = tokenizer.padding_side
    if "chats" in measures:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        items["chats"] = [labelled_losses(model, rows, pad).tolist()]
    if "text" in measures:
        losses = text_losses(model, tokenizer, held_out_texts(), TEXT_TOKENS, window=256)
        items["text"] = [each.tolist() for each in losses.values()]
    if "problems" in measures:
        right = exact_answers(model, tokenizer, held_out_problems(), chat=True)
        items["problems"] = [[float(is_right) for is_right in right]]
    tokenizer.padding_side = side
    return items


def value(measure: str, groups: Sequence[Sequence[float]]) -> float:
    """The value of a measure: a perplexity (geometric mean over groups), or per cent."""
    mean = sum(sum(group) / len(group) for group in groups) / len(groups)
    return 100 * mean if measure == "problems" else math.exp(mean)


def difference(measure: str, groups: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, float]:
    """Difference of two models on the same items, with a 95 % interval over items (paired bootstrap).

    Returns:
        ``value``, ``low``, ``high``: for perplexities the ratio, for problems the difference in points.
    """
    pairs = [np.subtract(a, b) for a, b in zip(groups, other, strict=True)]
    low, high = mean_interval([pair.tolist() for pair in pairs])
    mean = float(np.mean([pair.mean() for pair in pairs]))
    scale = (lambda x: 100 * x) if measure == "problems" else math.exp
    return {"value": scale(mean), "low": scale(low), "high": scale(high)}


def differs(measure: str, interval: Mapping[str, float]) -> bool:
    """Whether the interval excludes equality of the models."""
    equality = 0.0 if measure == "problems" else 1.0
    return not interval["low"] <= equality <= interval["high"]


def verdict(name: str, other: str, differences: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence that names every measure by which the models differ, or states that they do not.

    Args:
        differences: by measure, `difference` of `name` against `other`.
    """
    parts = []
    for key, by in differences.items():
        if differs(key, by):
            form = (
                f"answers {by['value']:+.1f} points of problems exactly ({by['low']:+.1f} to {by['high']:+.1f})"
                if key == "problems"
                else f"has {by['value']:.4f} times its perplexity on {key} ({by['low']:.4f} to {by['high']:.4f})"
            )
            parts.append(form)
    alike = [key for key, by in differences.items() if not differs(key, by)]
    if not parts:
        return f"{name} and {other} do not differ beyond the noise of the items ({', '.join(alike)})."
    rest = f"; by {', '.join(alike)} they do not differ beyond the noise of the items" if alike else ""
    return f"Against {other}, {name} {' and '.join(parts)}{rest}."
