"""The record of a run, as ``namex_report.json`` holds it."""

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field, replace
from typing import Any

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

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        return cls(**json.loads(text))

    def with_perplexity(self, perplexity: dict[str, dict[str, float]]) -> "Report":
        return replace(self, perplexity=perplexity)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"namex_hf": __version__, "python": platform.python_version(), **found}


def layer_summary(layer: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one layer's games that fit on a line of a table."""
    games = layer["games"]
    spreads = [game["spread"] for game in games]
    residuals = [game["residual"] for game in games if game["residual"] is not None]
    words = {game["status"] for game in games}
    return {
        "layer": layer["layer"],
        "games": len(games),
        "status": ", ".join(sorted(words)) or "no game",
        "spread": max(spreads, default=0.0),
        "residual": max(residuals, default=None),
        "groups": len(layer["groups"]) if "groups" in layer else None,
        "seconds": layer["seconds"],
    }
