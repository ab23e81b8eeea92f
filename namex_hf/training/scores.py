"""Scores of a model before and after training, item by item, and comparison of two models."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.arithmetic import exact_answers, held_out_problems
from ..evaluation.perplexity import held_out_texts, labelled_losses, text_losses
from ..evaluation.statistics import TEXT_TOKENS, differs

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
