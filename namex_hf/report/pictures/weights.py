"""What every expert weighs against a plain mean, and what the others do for it (eq. 10)."""

import math
from typing import Any

import numpy as np
import torch
from matplotlib.colors import TwoSlopeNorm

from ...bargaining.utilities import interaction
from ...merging.experts import FIELDS
from ..folder import PatchedFolder
from .picture import DIVERGING, Material, Picture, figure, limit

BLANK = "#b9bdc4"  # grey, on either ground, where nothing was given


def picture(material: Material) -> Picture | None:
    """Heat maps, layers by experts, a column a game; none where nothing was weighed."""
    folder = material.folder
    weights = relative_weights(folder)
    if not weights:
        return None
    maps = {
        "weight, 1 = plain mean": (weights, 1.0, 0.0),
        "share of the gain\nthat the others bring": (interactions(folder), 0.0, -math.inf),
    }
    maps = {title: one for title, one in maps.items() if one[0]}
    layers = [record["layer"] for record in folder.report.layers]
    drawn = figure(len(maps) * (1.1 + 0.17 * max(len(layers), 5)))
    axes = drawn.subplots(len(maps), len(weights), squeeze=False, sharex=True, sharey=True)
    for row, (title, (panels, centre, least)) in zip(axes, maps.items(), strict=True):
        most = limit(np.stack(list(panels.values())) - centre)
        norm = TwoSlopeNorm(centre, max(centre - most, least), centre + most)
        image: Any = None
        for place, (game, values) in zip(row, panels.items(), strict=True):
            image = place.imshow(values, cmap=DIVERGING, norm=norm, aspect="auto", interpolation="nearest")
            place.set_facecolor(BLANK)
            if place in axes[0]:
                place.set_title(game)
        row[0].set_ylabel("layer")
        row[0].set_yticks(range(len(layers)), [str(layer) for layer in layers])
        drawn.colorbar(image, ax=row, label=title, pad=0.015)
    for place in axes[-1]:
        place.set_xlabel("expert")
    inside = "its group" if "members" in str(folder.report.layers) else "all experts"
    line = (
        f"Top row: the weight of an expert over that of a plain mean of {inside} (blue: more, orange: less, grey: no"
        " game, no stake or no agreement)."
    )
    if len(maps) > 1:
        line += (
            " Bottom row: the interaction sum of eq. 10 as a share of the expert's gain: blue, the others pull the base"
            " the expert's way; orange, they hamper it, and under the bargain it gets more weight."
        )
    return Picture("2-weights", "What the experts weigh", line, drawn)


def relative_weights(folder: PatchedFolder) -> dict[str, np.ndarray]:
    """By game ``[layers, N]``: the weight over that of the game's plain mean; NaN where none was given."""
    records = folder.report.layers
    count = max((len(folder.cosines[layer][0]) for layer in folder.cosines), default=folder.shape.experts)
    panels: dict[str, np.ndarray] = {}
    for row, record in enumerate(records):
        for game in record["games"]:
            if game["weights"] is None or game["status"] == "no_agreement":
                continue
            values = np.asarray(game["weights"])
            panel = panels.setdefault(_name(game), np.full((len(records), count), np.nan))
            with np.errstate(invalid="ignore"):
                panel[row, game.get("members", range(len(values)))] = np.where(
                    values > 0, len(values) * values / values.sum(), np.nan
                )
    return panels


def interactions(folder: PatchedFolder) -> dict[str, np.ndarray]:
    """By game ``[layers, N]``: `interaction`; empty where the games were not played around one base expert."""
    records = folder.report.layers
    panels: dict[str, np.ndarray] = {}
    for row, record in enumerate(records):
        grams = folder.domain_grams(record["layer"])
        if grams is None:
            continue
        for game, gram in zip(record["games"], grams, strict=True):
            if game["weights"] is None:
                continue
            values = torch.tensor(game["weights"], dtype=torch.float64)
            panel = panels.setdefault(_name(game), np.full((len(records), len(values)), np.nan))
            panel[row] = torch.where(values > 0, interaction(gram, values), torch.nan)
    return panels


def _name(game: dict[str, Any]) -> str:
    return " + ".join(FIELDS[name] for name in game["projections"])
