"""The table of scores before and after training, on a card."""

from pathlib import Path
from typing import Any

from ..evaluation.statistics import MEASURES, changes, standard_error, value
from ..evaluation.table import Table
from ..files import SCORES, locate, read_json
from ..record import Report
from .card_text import plain
from .layers import with_error


def scores_of(report: Report, folder: Path | None) -> Table:
    """Scores before and after training; no rows of a folder without any.

    Args:
        folder: where `SCORES` may lie, which the standard errors come from.
    """
    scores, items = (report.training or {}).get("scores") or {"after": {}}, _items(folder)
    before, after = (items.get(when, {}) for when in ("before", "after"))
    paired = before.keys() & after.keys() & scores["after"].keys()
    rows = [
        [
            MEASURES.get(measure, plain(measure)),
            with_error(scores["before"][measure], standard_error(measure, before.get(measure))),
            with_error(scores["after"][measure], standard_error(measure, after.get(measure))),
            *([change(measure, before[measure], after[measure]) if measure in paired else ""] if paired else []),
        ]
        for measure in scores["after"]
    ]
    return Table(["score", "before training", "after", *(["change, item by item"] if paired else [])], rows)


def _items(folder: Path | None) -> dict[str, Any]:
    path = locate(folder, SCORES) if folder is not None else None
    return read_json(path) if path is not None and path.is_file() else {}


def change(measure: str, before: list[list[float]], after: list[list[float]]) -> str:
    """Of perplexities the ratio, of answers the difference in points, with the standard error of paired items."""
    apart = changes(after, before)
    sign, form = ("", "+.2f") if measure == "problems" else ("x ", ".3f")
    error = standard_error(measure, apart)
    return f"{sign}{value(measure, apart):{form}}" + ("" if error is None else f" ± {error:{form[-3:]}}")
