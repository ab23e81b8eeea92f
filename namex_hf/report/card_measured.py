"""What was measured, as a card shows it: perplexity before and after, and what fine-tuning did."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import SCORES, locate, read_json
from ..scoring.baseline import is_unmerged
from .card_text import plain, table
from .report import Report, ratio

MEASURES = {
    "chats": "perplexity of the assistant's turns in held-out chats",
    "text": "perplexity of packaged held-out text",
    "problems": "held-out word problems answered exactly, in per cent",
}


def perplexity_lines(report: Report) -> list[str]:
    """A table of the domains; nothing where none was measured."""
    if not report.perplexity:
        return []
    rows = [
        [
            plain(domain),
            _with_error(value["before"], value.get("before_stderr")),
            _with_error(value["after"], value.get("after_stderr")),
            _with_error(ratio(value), value.get("ratio_stderr"), 3),
        ]
        for domain, value in report.perplexity.items()
    ]
    return [
        "",
        "## Perplexity on held-out text",
        "",
        "On the beginnings of the texts that come with `namex_hf`; the mean is geometric."
        + _of_the_router(report.run.get("recipe", {}))
        + (" ± one standard error, of the ratio's paired by windows." if _has_errors(report.perplexity) else ""),
        "",
        *table(["domain", "before", "after", "ratio"], rows),
    ]


def _of_the_router(recipe: Mapping[str, Any]) -> str:
    routing = recipe.get("routing", "linear")
    if routing == "linear" or is_unmerged(recipe):
        return ""
    return (
        f" Before is the model with its own linear router, so the ratio is of the change to {plain(routing)} routing "
        "and of the merge together."
    )


def _has_errors(perplexity: dict[str, dict[str, float]]) -> bool:
    return any("ratio_stderr" in value for value in perplexity.values())


def _with_error(value: float, error: float | None, digits: int = 2) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def training_lines(report: Report, folder: Path | None) -> list[str]:
    """What was trained on what, and scores before and after; nothing of a folder that was not trained.

    Args:
        folder: where `SCORES` may lie, which the standard errors come from.
    """
    done = report.training
    if done is None:
        return []
    data, setting = report.run.get("data", {}), report.run.get("training", {})
    kinds = ", ".join(f"{plain(kind)} ({count:,} parameters)" for kind, count in done["trainable"].items())
    by = "Low-rank adapters, merged into the weights, were trained on" if setting.get("adapter") else "Trained were"
    bargain = done.get("bargain_seconds")
    how = (
        f" Every {setting.get('bargain_every')} steps the experts bargained again over the base expert."
        if bargain is not None
        else ""
    )
    if best := done.get("best_of"):
        how += (
            f" The weights, the scores and all other figures are those of the best checkpoint of {best['steps']:,} "
            f"steps, by {plain(best['metric'])} ({best['value']:.4g})."
        )
    lines = [
        "",
        "## Fine-tuning",
        "",
        f"{done['steps']:,} steps over {done['tokens']:,} tokens of {data.get('chats', 0):,} chats "
        f"({plain(data.get('name', 'unknown'))}) in {done['seconds']:.0f} s. Only tokens in the loss are counted. "
        f"{by}: {kinds}.{how}",
    ]
    if losses := [entry["loss"] for entry in done.get("loss", []) if "loss" in entry]:
        lines += ["", f"Training loss: {losses[0]:.3f} at the first record, {losses[-1]:.3f} at the last."]
    if scores := done.get("scores"):
        lines += ["", *_score_lines(scores, _items(folder))]
    return lines


def _score_lines(scores: dict[str, dict[str, float]], items: dict[str, Any]) -> list[str]:
    before, after = (items.get(when, {}) for when in ("before", "after"))
    paired = before.keys() & after.keys() & scores["after"].keys()
    rows = [
        [
            MEASURES.get(measure, plain(measure)),
            _with_error(scores["before"][measure], standard_error(measure, before.get(measure))),
            _with_error(scores["after"][measure], standard_error(measure, after.get(measure))),
            *([change(measure, before[measure], after[measure]) if measure in paired else ""] if paired else []),
        ]
        for measure in scores["after"]
    ]
    titles = ["score", "before training", "after", *(["change, item by item"] if paired else [])]
    return [*table(titles, rows), *(["", "± one standard error over the items of the score."] if paired else [])]


def _items(folder: Path | None) -> dict[str, Any]:
    path = locate(folder, SCORES) if folder is not None else None
    return read_json(path) if path is not None and path.is_file() else {}


def standard_error(measure: str, groups: list[list[float]] | None) -> float | None:
    """Of a score's figure: a perplexity (by the delta method), or per cent; None where there are too few items.

    Args:
        groups: losses in nats a group, such as the windows of a domain, or 1 and 0 for right and wrong answers.
    """
    if not groups or min(map(len, groups)) < 2:
        return None
    mean = float(np.mean([np.mean(group) for group in groups]))
    error = math.sqrt(sum(float(np.var(group, ddof=1)) / len(group) for group in groups)) / len(groups)
    return 100 * error if measure == "problems" else math.exp(mean) * error


def change(measure: str, before: list[list[float]], after: list[list[float]]) -> str:
    """Of perplexities the ratio, of answers the difference in points, with the standard error of paired items."""
    apart = [np.subtract(new, old).tolist() for old, new in zip(before, after, strict=True)]
    error = standard_error(measure, apart)
    mean = float(np.mean([np.mean(group) for group in apart]))
    if measure == "problems":
        return f"{100 * mean:+.2f}" + ("" if error is None else f" ± {error:.2f}")
    return f"x {math.exp(mean):.3f}" + ("" if error is None else f" ± {error:.3f}")
