"""A comparison as one HTML page: nothing is fetched, nothing is run, light and dark by the reader."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import yaml

from ..evaluation.compare import Comparison
from ..evaluation.compare_table import costs, notes, quality
from .page import document, figure

if TYPE_CHECKING:
    from .pictures import Picture

FIRST_LEFT = "th:first-child, td:first-child { text-align: left; }\n"


def page(found: Comparison, pictures: Sequence["Picture"]) -> str:
    """The page as text. Everything that comes from a checkpoint or a file is escaped.

    Args:
        pictures: none where they cannot be drawn; the page is whole without.
    """
    title = f"Recipes on {found.plan.checkpoint.name}, side by side"
    parts = [
        *map(figure, pictures),
        "<h2>What each model is worth</h2>",
        quality(found).html(),
        "<h2>What each model takes</h2>",
        costs(found).html(),
        "<ul>",
        *(f"<li>{escape(note)}</li>" for note in notes(found)),
        "</ul>",
        "<h2>Recipes</h2>",
    ]
    for label, wanted in found.plan.requests.items():
        if wanted.recipe is not None:
            text = yaml.safe_dump(wanted.identity["recipe"], sort_keys=False)
            parts.append(f"<details><summary>{escape(label)}</summary><pre>{escape(text)}</pre></details>")
    return document(title, parts, found.plan.run["versions"], FIRST_LEFT)
