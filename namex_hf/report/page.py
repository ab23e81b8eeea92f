"""The page of a patched folder: nothing is fetched, nothing is run, light and dark by the reader."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..record import Report, choices
from ..render import rendered
from .layers import layer_table, perplexity_table

if TYPE_CHECKING:
    from .pictures import Picture

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(report: Report, recipe_text: str, pictures: Sequence["Picture"]) -> str:
    """The page as text. Everything that comes from a checkpoint or a report is escaped.

    Args:
        recipe_text: the recipe as YAML.
        pictures: with at least one element, or none: the page then says so.
    """
    name = report.source["name"] or "a model of unknown source"
    return rendered(
        "patched.html",
        title=f"{name}, patched by namex_hf",
        recipe=report.run["recipe"],
        choices=choices(report.run["recipe"]),
        perplexity=perplexity_table(report),
        pictures=pictures,
        layers=layer_table(report),
        recipe_text=recipe_text,
        versions=report.versions,
        policy=POLICY,
    )
