"""The paper's own numbers, by model x routing x method x disagreement x benchmark."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..recipe import Recipe
from .candidates import shape_of

MODELS = {("qwen2_moe", 24, 2048): ("17", "Qwen1.5-MoE"), ("deepseek", 28, 2048): ("4", "Deepseek-MoE")}
"""Family, layers, width -> the table with both its columns and both disagreement points, and the model's name in it.
Tables 10 and 11 repeat Table 17 without the mean disagreement point."""
BENCHMARKS = {"mmlu": "MMLU", "gsm8k": "GSM8K", "arc_challenge": "ARC", "arc_easy": "ARC"}
"""The paper does not say which half of ARC it used."""
ROUTINGS = {"linear": "Linear", "cosine": "Cosine", "stable": "Stable-MoE"}
STAGES = {"zero-shot": "zs", "fine-tuned": "ft"}
ROWS = {
    ("smoe", "zero"): "",
    ("ep-camex", "zero"): "EP-CAMEx",
    ("namex-full", "zero"): "NAMEx-Full (0 disagreement point)",
    ("namex-full", "mean"): "NAMEx-Full (mean disagreement point)",
}
"""Method and disagreement point -> the row's name."""
ROW = ("method", "disagreement", "routing")
"""Fields in which published rows differ."""
READINGS = ("merge", "solver", "first_layer")
"""Fields of which two values are published readings: ``residual`` or eq. 9 (``soft``); the bargain solved exactly or by
the paper's procedure of 2 iterations a layer; the first MoE layer merged or sparse."""
SILENT = ("temperature", "calibration_data", "calibration_tokens", "calibrate", "seed")
"""Fields of which the paper says nothing: how the routers of a pretrained model are made. A field that is in none of
these three lists has the default's value in a published row."""


@dataclass(frozen=True)
class PaperScore:
    """In per cent, as printed; the paper gives no standard error for these."""

    table: str
    value: float
    original: float
    """Of the paper's unpatched model with the same routing."""


class Paper:
    """Args: path, of ``paper_tables.json``; stage, one of `STAGES`."""

    def __init__(self, path: Path, stage: str = "zero-shot"):
        self._tables, self._stage = json.loads(path.read_text("utf-8"))["tables"], stage

    def score(self, config: Mapping[str, Any], recipe: Mapping[str, Any] | None, task: str) -> PaperScore | None:
        """The paper's number for a model; None where it has none.

        Args:
            config: of the model.
            recipe: None of an unpatched one.
        """
        shape = shape_of(config)
        row = row_name(recipe)
        if shape not in MODELS or task not in BENCHMARKS or row is None:
            return None
        table, name = MODELS[shape]
        router = ROUTINGS[(recipe or {}).get("routing", "linear")]
        column = self._tables[table]["columns"].index(f"{STAGES[self._stage]}_{BENCHMARKS[task]}")
        values = {r["model"]: r["values"][column] for r in self._tables[table]["rows"] if r["router"] == router}
        return PaperScore(table, values[row or name], values[name])


def row_name(recipe: Mapping[str, Any] | None) -> str | None:
    """What a table calls a recipe: an empty name for the unpatched model, None where it has no such row."""
    if recipe is None:
        return ""
    try:
        chosen = Recipe.from_stored(recipe)
        values = chosen.to_dict()
        published = Recipe(**{name: values[name] for name in (*ROW, *READINGS, *SILENT)})
    except RecipeError:  # such as a grouped merge: no row has one
        return None
    return ROWS.get((values["method"], values["disagreement"])) if chosen == published else None
