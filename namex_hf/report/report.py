"""The record of a run, as ``namex/report.json`` holds it."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import read_json
from ..version import __version__

LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class Report:
    """Everything that was decided and measured. All values are plain."""

    run: dict[str, Any]  # recipe, hash of the source, options: what makes the run this run
    source: dict[str, Any]  # name, commit, hash, bytes; never a local path
    family: str
    layers: list[dict[str, Any]]  # one a MoE layer
    totals: dict[str, Any]
    versions: dict[str, str] = field(default_factory=lambda: versions())
    perplexity: dict[str, dict[str, float]] | None = None  # domain -> before, after
    training: dict[str, Any] | None = None  # what was trained on what, and what came of it
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # size and hash of each that belongs to the result

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        return cls(**json.loads(text))

    @classmethod
    def from_file(cls, path: Path) -> "Report":
        """Raises:
        CheckpointError: no such file, or no report of this package.
        """
        values = read_json(path)
        try:
            report = cls(**values)
            _ = [(record["layer"], record["games"], record["seconds"]) for record in report.layers]
            _ = (report.run["recipe"]["merge"], report.source["name"], report.totals["seconds"])
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is no report of namex_hf ({error})") from error
        return report

    def with_routing(self, records: list[dict[str, Any]]) -> "Report":
        """Args: records, one a layer."""
        layers = [{**layer, "routing": record} for layer, record in zip(self.layers, records, strict=True)]
        return replace(self, layers=layers)

    def with_perplexity(self, perplexity: dict[str, dict[str, float]]) -> "Report":
        return replace(self, perplexity=perplexity)


def ratio(one: dict[str, float]) -> float:
    """Perplexity after over before; no number where a record has no perplexity before."""
    return one["after"] / one["before"] if one["before"] else math.nan


def versions(*more: str) -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in (*LIBRARIES, *more)}
    return {"namex_hf": __version__, "python": platform.python_version(), **found}


def layer_summary(layer: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one layer that fit on a line of a table.

    Errors are of the layer's output to the calibration text, relative to the original's: once merged, and at the end.
    Agreement is the share of a token's experts that the linear router would choose too, load entropy that of the
    experts' shares over that of equal shares.
    """
    games = layer["games"]
    spreads = [game["spread"] for game in games if game["spread"] is not None]
    residuals = [game["residual"] for game in games if game["residual"] is not None]
    words = {game["status"] for game in games}
    errors = [one["error"] for one in layer.get("errors", [])]
    routing = layer.get("routing", {})
    return {
        "layer": layer["layer"],
        "games": len(games),
        "status": ", ".join(sorted(words)) or "no game",
        "spread": max(spreads, default=None),
        "residual": max(residuals, default=None),
        "groups": len(layer["groups"]) if "groups" in layer else None,
        "error_merged": errors[0] if errors else None,
        "error_fitted": errors[-1] if len(errors) > 1 else None,
        "agreement": routing.get("agreement"),
        "load_entropy_linear": routing.get("load_entropy_linear"),
        "load_entropy": routing.get("load_entropy"),
        "seconds": layer["seconds"],
    }


def choices(recipe: Mapping[str, Any]) -> str:
    """Method, merge and routing of a stored recipe; no method where none merges experts."""
    merge = recipe.get("merge")
    named = [merge] if merge == "narrow" else [recipe.get("method"), merge]
    return ", ".join(map(str, (*named, f"{recipe.get('routing')} routing")))


COLUMNS = {
    "layer": ("layer", "d"),
    "groups": ("groups", "d"),
    "games": ("games", "d"),
    "status": ("status", "s"),
    "spread": ("spread of weights", ".4f"),
    "residual": ("residual", ".1e"),
    "error_merged": ("error merged", ".4f"),
    "error_fitted": ("error fitted", ".4f"),
    "agreement": ("agreement with linear", ".3f"),
    "load_entropy_linear": ("load entropy, linear", ".3f"),
    "load_entropy": ("load entropy", ".3f"),
    "seconds": ("seconds", ".2f"),
}
"""Title and form of what `layer_summary` gives to a table."""


def layer_table(report: Report, *left_out: str) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the table of layers; what only text tells where it did, groups where layers differ in them."""
    rows = [layer_summary(layer) for layer in report.layers]
    told_by_text = ("error_merged", "error_fitted", "agreement", "load_entropy_linear", "load_entropy")
    untold = {name for name in told_by_text if all(row[name] is None for row in rows)}
    if len({row["groups"] for row in rows}) == 1:
        untold.add("groups")
    shown = {name: column for name, column in COLUMNS.items() if name not in untold.union(left_out)}
    texts = [
        ["" if row[name] is None else format(row[name], form) for name, (_, form) in shown.items()] for row in rows
    ]
    return [title for title, _ in shown.values()], texts
