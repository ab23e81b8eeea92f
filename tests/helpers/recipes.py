"""Recipes by what they make, with a text and a fit short enough for tests."""

from pathlib import Path
from typing import Any

from namex_hf import Recipe

Fields = dict[str, Any]
TOKENS = 1024
CURVED: Fields = {"curvature": "calibrated"}
MOMENTUM: Fields = {"momentum": "complex", "beta": "0.9,0.5"}
COSINE: Fields = {"routing": "cosine"}
BY_TEXT: Fields = {"routing": "cosine", "temperature": "entropy"}
STABLE: Fields = {"routing": "stable"}
SOFT: Fields = {"merge": "soft", "segment": 4}
GROUPED: Fields = {"merge": "grouped", "experts": 4}
FITTED: Fields = {**GROUPED, "fit": "router", "fit_steps": 20}
KRONECKER: Fields = {**SOFT, "curvature": "kronecker"}
NARROW: Fields = {"merge": "narrow", "width": 16}
WIDE: Fields = {"moe_intermediate_size": 24}
"""Of a toy for `NARROW`: grouped products take rows of both widths in any dtype, and the shared expert of DeepSeek, 72
neurons, grows to 80, a multiple of 16."""

PLAIN: dict[str, Fields] = {
    "namex-full": {},
    "every-second": {"base": "shared", "every": 2, "disagreement": "mean"},
    "ep-camex": {"method": "ep-camex", "base": "mean"},
    "namex": {"method": "namex", "granularity": "expert", "base": "index:3"},
    "grouped": {"merge": "grouped", "experts": 3},
    "grouped-uniform": {"merge": "grouped", "experts": 4, "weighting": "uniform"},
    "grouped-one": {"merge": "grouped", "experts": 1, "granularity": "expert"},
    "grouped-all": {"merge": "grouped", "experts": 7},
    "smoe": {"method": "smoe"},
    "camex": {"method": "camex", "base": "first"},
    "soft-camex": {"method": "camex", "merge": "soft", "segment": 3},
    "smear": {"method": "smear", "merge": "soft", "segment": 3},
    "soft": {"merge": "soft", "renormalise": True, "eta": 0.5},
}
"""Of weights alone."""
SHRUNK: dict[str, Fields] = {
    "fit": {"fit": "router"},
    "before": {"fit": "router", "calibrate": "before"},
    "diagonal": {"curvature": "diagonal"},
    "hc-smoe": {"grouping": "outputs", "weighting": "usage"},
    "gates": {"grouping": "router", "align": "weights", "disagreement": "mean", "power": "usage"},
    "refit": {"down": "refit", "granularity": "expert"},
    "one": {"fit": "router", "experts": 1},
    "layer": {"fit": "layer"},
    "original": {"fit": "router", "target": "model"},
    "ream": {"grouping": "router", "weighting": "saliency", "align": "activations"},
    "kept": {"fit": "router", "operator": "keep"},
    "reap": {"operator": "keep", "grouping": "none", "weighting": "saliency", "down": "refit"},
    "random": {"fit": "layer", "operator": "random"},
    "shared": {"fit": "router", "operator": "shared", "down": "merge"},
}
"""Fewer experts, by a text: what is added to the fields of `shrunk`."""
CURVES: dict[str, Fields] = {
    "namex-full": CURVED,
    "namex": {**CURVED, "method": "namex", "base": "first"},
    "ep-camex": {**CURVED, "method": "ep-camex", **MOMENTUM},
    "camex": {**CURVED, "method": "camex", "base": "mean"},
    "smear": {**CURVED, "method": "smear"},
    "not-aligned": {**CURVED, "align": "none"},
    "by-weights": {**CURVED, "align": "weights"},
    "identity": {"align": "activations"},
    "identity-by-weights": {"align": "weights"},
    "before": {**CURVED, "calibrate": "before"},
    "rank-1": {**CURVED, "rank": 1},
    "rank-3": {**CURVED, "rank": 3},
    "previous": {**CURVED, "routing_span": "previous"},
}
"""All experts, soft, by a text: what is added to `SOFT`."""
ROUTED: dict[str, Fields] = {
    "cosine": {**COSINE, "method": "smoe"},
    "cosine-grouped": {**COSINE, **GROUPED},
    "entropy": {**BY_TEXT, "method": "smoe"},
    "entropy-residual": {**BY_TEXT, **MOMENTUM, "calibrate": "before"},
    "entropy-curved": {**COSINE, **SOFT, **CURVED, "rank": 2},
    "entropy-fitted": {**COSINE, **FITTED},
    "entropy-smear": {**BY_TEXT, **SOFT, "method": "smear"},
    "stable-smoe": {**STABLE, "method": "smoe"},
    "stable-curved": {**STABLE, **SOFT, **CURVED, "rank": 2, "method": "camex", "base": "first"},
    "stable-fitted": {**STABLE, **FITTED},
    "stable-top-2": {**STABLE, **SOFT, "top_k": 2, "method": "smear"},
    "kronecker": {**KRONECKER, "rank": 2, "seed": 5},
    "kronecker-stable": {**KRONECKER, **STABLE, "rank": 2, "method": "smear"},
    "kronecker-aligned": {**KRONECKER, **COSINE, "align": "activations", "method": "ep-camex"},
}
"""Another router, or a curvature that trains."""


def recipe_of(words: Path, fields: Fields, tokens: int = TOKENS) -> Recipe:
    """With the text where one is read, and a fit of a few steps."""
    values = {"fit_steps": 10, **fields} if fields.get("fit", "none") != "none" else fields
    if Recipe(**values).needs_text:
        values = {"calibration_tokens": tokens, "calibration_data": str(words), **values}
    return Recipe(**values)


def shrunk(fields: Fields) -> Fields:
    return {"merge": "grouped", "experts": 3, **fields}
