"""The utilities of three experts under the Nash step and the plain mean's (the paper's Figure 11), for real experts."""

from typing import Any

import numpy as np
import torch

from ...bargaining.utilities import ThreePlayerGame, aligned_utilities, furthest_gains, three_most_apart
from .picture import COLOURS, INK, Material, Picture, figure, plain

STEPS = {"Nash": COLOURS[0], "plain mean": COLOURS[1]}


def picture(material: Material) -> Picture | None:
    """Of the layer asked for, or of the one where the two steps differ most; none where three do not agree."""
    by_layer = {}
    for layer in material.folder.shape.layers:
        grams = material.folder.domain_grams(layer) if material.folder.recipe.merge.has_base else None
        if grams is not None and material.layer in (None, layer) and (three := three_most_apart(grams.sum(0))):
            by_layer[layer] = three
    if not by_layer:
        return None
    layer = min(by_layer, key=lambda one: by_layer[one].cosine)
    three = by_layer[layer]
    gains = {
        "Nash": aligned_utilities(three.gram, three.weights),
        "plain mean": aligned_utilities(three.gram, torch.ones_like(three.weights)),
    }
    drawn = figure(4.0)
    parts: Any = drawn.subfigures(1, 2, width_ratios=[1.25, 1])
    left, right = parts
    _sphere(left.add_subplot(projection="3d"), three, gains)
    _bars(right.subplots(), three, gains)
    names = ", ".join(map(str, three.players))
    chosen = (
        "this layer was asked for" if material.layer is not None else "of all layers the one where they differ most"
    )
    line = (
        f"Layer {layer} ({chosen}), experts {names} (the three whose two steps differ most; cosine between the steps"
        f" {three.cosine:.4f}). The surface is what a step of length 1 can give the three (that with a gain in sum),"
        " green where none of them loses; an arrow is what one step gives. The bars are the same gains in units of"
        " |tau|: the bargain lifts the shortest bar at the cost of the longest"
    )
    if (gains["plain mean"] > 0).all():
        line += f"; its product of gains is {(gains['Nash'] / gains['plain mean']).prod():.4f} times the mean's"
    line += "."
    return Picture("4-utilities", "Three experts bargain", line, drawn)


def half_sphere(rings: int = 7, around: int = 25) -> np.ndarray:
    """Directions of length 1 in which the three gain together, the pole (1, 1, 1): ``[rings, around, 3]``."""
    pole, side, third = np.linalg.qr(np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 1.0], [1.0, 0.0, -1.0]]))[0].T
    fall, turn = np.meshgrid(np.linspace(0, np.pi / 2, rings), np.linspace(0, 2 * np.pi, around), indexing="ij")
    circle = np.cos(turn)[..., None] * side + np.sin(turn)[..., None] * third
    return np.cos(fall)[..., None] * pole * np.sign(pole.sum()) + np.sin(fall)[..., None] * circle


def octant(steps: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Directions in which none of the three loses, ``[points, 3]``, and triangles between them, ``[triangles, 3]``."""
    places = {(i, j): (i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)}
    number = {place: index for index, place in enumerate(places)}
    triangles = [
        [number[corner] for corner in corners]
        for i, j in places
        for corners in (((i, j), (i + 1, j), (i, j + 1)), ((i + 1, j), (i + 1, j + 1), (i, j + 1)))
        if all(corner in number for corner in corners)
    ]
    return np.array(list(places.values()), dtype=float), np.array(triangles)


def _sphere(axes: Any, three: ThreePlayerGame, gains: dict[str, torch.Tensor]) -> None:
    rings = furthest_gains(three.gram, torch.from_numpy(half_sphere())).numpy()
    directions, triangles = octant()
    surface = furthest_gains(three.gram, torch.from_numpy(directions)).numpy()
    axes.plot_wireframe(*np.moveaxis(rings, -1, 0), color="#8a8d91", linewidth=0.5, alpha=0.7)
    axes.plot_trisurf(*surface.T, triangles=triangles, color="#159a80", alpha=0.3, linewidth=0, shade=False)
    for name, gain in gains.items():
        axes.quiver(0, 0, 0, *gain.tolist(), color=STEPS[name], linewidth=2.2, arrow_length_ratio=0.12, label=name)
    for axis, player in zip((axes.xaxis, axes.yaxis, axes.zaxis), three.players, strict=True):
        axis.set_pane_color((1, 1, 1, 0))
        axis.set_label_text(f"gain of expert {player}")
        axis._axinfo["grid"].update(color=(0.5, 0.5, 0.5, 0.25))
    axes.set_proj_type("ortho")
    axes.view_init(elev=20, azim=-22)
    axes.tick_params(labelsize=7)
    axes.locator_params(nbins=4)
    axes.legend(fontsize=8, loc="upper left")


def _bars(axes: Any, three: ThreePlayerGame, gains: dict[str, torch.Tensor]) -> None:
    for index, (name, gain) in enumerate(gains.items()):
        places = np.arange(3) + 0.38 * (index - 0.5)
        drawn = axes.bar(places, gain.tolist(), 0.36, color=STEPS[name], label=name, hatch="//" if index else None)
        axes.bar_label(drawn, fmt="%.3f", fontsize=7, color=INK, padding=2)
    axes.set_xticks(range(3), [f"expert {player}" for player in three.players])
    axes.set_ylabel("gain, in units of |tau| of the expert")
    axes.margins(y=0.15)
    axes.axhline(0, color=INK, linewidth=0.8)
    plain(axes)
    axes.grid(False, axis="x")
