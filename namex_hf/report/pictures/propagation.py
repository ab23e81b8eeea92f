"""How far the base expert moves (the paper's Figure 5), and how near the bargain stays to the plain mean."""

from typing import Any

from matplotlib.axes import Axes

from ...merging.experts import FIELDS
from ..folder import PatchedFolder
from .picture import Material, Picture, figure, from_zero, layers_below, legend_below, line_style, plain


def picture(material: Material) -> Picture | None:
    """Distances by method and cosines by game, as far as they are known."""
    folder, parts = material.folder, []
    cosines = cosines_to_mean(folder)
    if material.distances:
        parts.append("distances")
    if cosines:
        parts.append("cosines")
    if not parts:
        return None
    drawn = figure(3.8)
    line = ""
    for place, part in zip(drawn.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        if part == "distances":
            values = folder.recipe.to_dict()
            _distances(place, folder, material.distances)
            line += (
                "How far the base expert moves between a MoE layer and the next, if each method walks over this"
                f" folder's experts from the base '{values['base']}' with gamma {values['gamma']:g}: falling"
                " lines settle, rising ones do not; lines on each other are the same walk. "
            )
        else:
            _cosines(place, folder, cosines)
            line += (
                "Cosine between the step that the weights make and the plain mean's: 1 where weighing changes nothing."
            )
    return Picture("3-walk", "The walk of the base expert", line.strip(), drawn)


def cosines_to_mean(folder: PatchedFolder) -> dict[str, list[tuple[int, float]]]:
    """By game: pairs of layer and cosine."""
    by_game: dict[str, list[tuple[int, float]]] = {}
    for record in folder.report.layers:
        for game in record["games"]:
            if game.get("cosine_to_mean") is not None:
                name = " + ".join(FIELDS[part] for part in game["projections"])
                by_game.setdefault(name, []).append((record["layer"], game["cosine_to_mean"]))
    return by_game


def _distances(axes: Axes, folder: PatchedFolder, distances: Any) -> None:
    layers = list(folder.shape.layers)
    for index, (name, values) in enumerate(distances.items()):
        # Equal lines do not hide each other.
        sizes = {"linewidth": max(1.5, 5 - 1.5 * index), "markersize": max(4, 9 - 2 * index)}
        axes.plot(layers[1:], values, **line_style(index) | sizes, label=name)
    layers_below(axes, layers[1:])
    axes.set_xlabel("layer that the base expert comes to")
    axes.set_ylabel("L2 distance from the base before")
    from_zero(axes)
    legend_below(axes, columns=2)
    plain(axes)


def _cosines(axes: Axes, folder: PatchedFolder, cosines: dict[str, list[tuple[int, float]]]) -> None:
    for index, (name, pairs) in enumerate(cosines.items()):
        shift = 0.12 * (index - (len(cosines) - 1) / 2)  # so that equal values do not hide each other
        layers, values = zip(*pairs, strict=True)
        style = line_style(index) | {"linestyle": "none"}
        axes.plot([layer + shift for layer in layers], values, **style, label=name)
    layers_below(axes, list(folder.shape.layers))
    axes.set_ylabel("cosine to the plain mean's step")
    axes.ticklabel_format(axis="y", useOffset=False)
    legend_below(axes, columns=3)
    plain(axes)
