"""The page of a patched folder: nothing is fetched, nothing is run, light and dark by the reader."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..evaluation.verdict import better
from ..files import size_text
from ..record import Report, choices, ratio
from ..render import rendered
from .layers import layer_table, perplexity_table

if TYPE_CHECKING:
    from .pictures import Picture

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def summary(report: Report) -> dict[str, str]:
    """The run in a few numbers: what is left, what was lost, time and memory."""
    totals, recipe = report.totals, report.run["recipe"]
    numbers = {}
    if "bytes_in" in totals:  # not of a trained folder, nor of one whose report was rebuilt
        numbers["bytes"] = f"{size_text(totals['bytes_in'])} to {size_text(totals['bytes_out'])}"
    if recipe["merge"] == "grouped":
        numbers["routed experts a layer"] = str(recipe["experts"])
    if recipe.get("width") is not None:  # release 0.1.0 had no widths
        numbers["neurons a routed expert"] = str(recipe["width"])
    if mean := (report.perplexity or {}).get("mean"):
        numbers["perplexity"] = f"{ratio(mean):.3f} times"
    if answers := report.answers:
        numbers["exact answers"] = f"{answers['after']} of {answers['problems']}, before {answers['before']}"
    if totals["seconds"] is not None:
        numbers["time"] = f"{totals['seconds']:.0f} s"
    if peak := totals.get("peak_resident_bytes"):
        numbers["memory"] = size_text(peak)
    return numbers


def page(report: Report, recipe_text: str, pictures: Sequence["Picture"], drawn: bool = True) -> str:
    """The page as text. Everything that comes from a checkpoint or a report is escaped.

    Args:
        recipe_text: the recipe as YAML.
        pictures: with at least one element, or none: the page then says so.
        drawn: False: nothing could be drawn, for want of matplotlib.
    """
    name = report.source["name"] or "a model of unknown source"
    return rendered(
        "patched.html",
        title=f"{name}, patched by namex_hf",
        recipe=report.run["recipe"],
        choices=choices(report.run["recipe"]),
        perplexity=perplexity_table(report),
        pictures=pictures,
        drawn=drawn,
        summary=summary(report),
        hint=better(report.run),
        layers=layer_table(report),
        recipe_text=recipe_text,
        versions=report.versions,
        policy=POLICY,
    )
