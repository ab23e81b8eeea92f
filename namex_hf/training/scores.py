"""What a model can do before and after training, item by item, and whether two models differ."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..scoring.arithmetic import exact_answers, held_out_problems
from ..scoring.intervals import mean_interval
from ..scoring.labelled import labelled_losses
from ..scoring.perplexity import held_out_texts, text_losses

TEXT_TOKENS = 4096
"""Of each domain of the packaged held-out text."""
MEASURES = {
    "chats": "perplexity of the assistant's turns in held-out chats",
    "text": f"perplexity of packaged held-out text, the first {TEXT_TOKENS} tokens of each domain",
    "problems": "held-out word problems answered exactly, in per cent",
}
Items = dict[str, list[list[float]]]
"""By measure groups of items: losses in nats, or 1 for a right answer and 0 for a wrong one."""


def measure(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], measures: Sequence[str]) -> Items:
    """Score a model.

    Args:
        rows: held-out chats as the trainer has made them ready, ``input_ids`` and ``labels``.
        measures: of `MEASURES`.
    """
    found: Items = {}
    side = tokenizer.padding_side
    if "chats" in measures:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        found["chats"] = [labelled_losses(model, rows, pad).tolist()]
    if "text" in measures:
        losses = text_losses(model, tokenizer, held_out_texts(), TEXT_TOKENS, window=256)
        found["text"] = [each.tolist() for each in losses.values()]
    if "problems" in measures:
        right = exact_answers(model, tokenizer, held_out_problems(), chat=True)
        found["problems"] = [[float(one) for one in right]]
    tokenizer.padding_side = side
    return found


def value(measure: str, groups: Sequence[Sequence[float]]) -> float:
    """The figure of a measure: a perplexity (geometric mean over groups), or per cent."""
    mean = sum(sum(group) / len(group) for group in groups) / len(groups)
    return 100 * mean if measure == "problems" else math.exp(mean)


def difference(measure: str, groups: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, float]:
    """One model against another on the same items, with a 95 % interval over items (paired bootstrap).

    Returns:
        ``value``, ``low``, ``high``: of perplexities the ratio, of answers the difference in points.
    """
    pairs = [np.subtract(a, b) for a, b in zip(groups, other, strict=True)]
    low, high = mean_interval([pair.tolist() for pair in pairs])
    mean = float(np.mean([pair.mean() for pair in pairs]))
    scale = (lambda x: 100 * x) if measure == "problems" else math.exp
    return {"value": scale(mean), "low": scale(low), "high": scale(high)}


def differs(measure: str, found: Mapping[str, float]) -> bool:
    """Whether the interval leaves out that both are alike."""
    alike = 0.0 if measure == "problems" else 1.0
    return not found["low"] <= alike <= found["high"]


def verdict(name: str, other: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence on each measure by which one model differs from the other, or that it differs by none.

    Args:
        found: by measure, `difference` of `name` against `other`.
    """
    parts = []
    for key, what in found.items():
        if differs(key, what):
            form = (
                f"answers {what['value']:+.1f} points of problems exactly ({what['low']:+.1f} to {what['high']:+.1f})"
                if key == "problems"
                else f"has {what['value']:.4f} times its perplexity on {key} ({what['low']:.4f} to {what['high']:.4f})"
            )
            parts.append(form)
    alike = [key for key, what in found.items() if not differs(key, what)]
    if not parts:
        return f"{name} and {other} do not differ beyond the noise of the items ({', '.join(alike)})."
    rest = f"; by {', '.join(alike)} they do not differ beyond the noise of the items" if alike else ""
    return f"Against {other}, {name} {' and '.join(parts)}{rest}."
