"""The record of a run, as ``namex/report.json`` holds it."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import read_json
from .version import __version__

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
    answers: dict[str, Any] | None = None  # problems answered before and after, and the difference in points
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


def choices(recipe: Mapping[str, Any]) -> str:
    """Method, merge and routing of a stored recipe; no method where none merges experts."""
    merge = recipe.get("merge")
    named = [merge] if merge == "narrow" else [recipe.get("method"), merge]
    return ", ".join(map(str, (*named, f"{recipe.get('routing')} routing")))


def ratio(one: dict[str, float]) -> float:
    """Perplexity after over before; no number where a record has no perplexity before."""
    return one["after"] / one["before"] if one["before"] else math.nan


def versions(*more: str) -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in (*LIBRARIES, *more)}
    found["torch"] = importlib.import_module("torch").__version__  # with its build, which metadata may lack
    return {"namex_hf": __version__, "python": platform.python_version(), **found}
