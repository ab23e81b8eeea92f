"""Which experts became one: the groups of ``merge: grouped`` on the tree of how alike the experts' weights are."""

from typing import Any

import torch
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from ...recipe import Grouped
from .picture import COLOURS, INK, Material, Picture, figure

ONE_A_ROW = 24  # experts from which on a panel needs the whole width


def picture(material: Material) -> Picture | None:
    """A tree a layer; none where nothing was grouped."""
    folder = material.folder
    trees = {
        record["layer"]: (folder.cosines[record["layer"]].mean(0).double(), record["groups"], record.get("kept"))
        for record in folder.report.layers
        if "groups" in record and record["layer"] in folder.cosines
    }
    merge = folder.recipe.merge
    if not isinstance(merge, Grouped) or merge.is_control:
        return None  # none of the experts had a part in what came out
    trees = {layer: tree for layer, tree in trees.items() if len(tree[0]) > 1}
    if not trees:
        return None
    columns = 1 if max(len(cosines) for cosines, *_ in trees.values()) > ONE_A_ROW else 2
    rows = -(-len(trees) // columns)
    drawn = figure(0.3 + 1.75 * rows)
    axes = drawn.subplots(rows, columns, squeeze=False)
    for place in axes.ravel()[len(trees) :]:
        place.set_visible(False)
    for place, (layer, (cosines, groups, kept)) in zip(axes.ravel(), trees.items(), strict=False):
        _tree(place, cosines, marks(groups) if kept is None else pruned(len(cosines), kept))
        place.set_title(f"layer {layer}: {len(cosines)} experts in {len(groups)} groups")
    for row in axes:
        row[0].set_ylabel("1 - cosine")
    line = (
        "The tree joins experts whose weights are alike, the more alike the lower (average linkage). Below it the"
        " number of each expert and, for groups of two or more, the letter of its group; a dot is an expert that stays"
        f" as it was. Groups were found by '{merge.grouping}', so they need not follow the tree."
        + (" A cross is an expert that is gone." if merge.operator == "keep" else "")
    )
    return Picture("6-groups", "Which experts became one", line, drawn)


def letters(number: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(ord("A") + rest) + text
    return text


def marks(groups: list[list[int]]) -> dict[int, tuple[str, str]]:
    """By expert the letter of its group and a colour; a dot and ink for a group of one."""
    of_expert = {}
    several = [group for group in groups if len(group) > 1]
    for group in groups:
        at = several.index(group) if len(group) > 1 else None
        for member in group:
            of_expert[member] = ("·", INK) if at is None else (letters(at), COLOURS[at % len(COLOURS)])
    return of_expert


def pruned(experts: int, kept: list[int]) -> dict[int, tuple[str, str]]:
    """By expert a dot where it stays and a cross where it went, and a colour."""
    return {expert: ("·", INK) if expert in kept else ("×", COLOURS[0]) for expert in range(experts)}


def _tree(axes: Any, cosines: torch.Tensor, of_expert: dict[int, tuple[str, str]]) -> None:
    distance = (1 - cosines).clamp(min=0)
    tree = dendrogram(linkage(squareform(distance.numpy(), checks=False), "average"), no_plot=True)
    for across, up in zip(tree["icoord"], tree["dcoord"], strict=True):
        axes.plot(across, up, color=INK, linewidth=0.9)
    lowest = min(height for up in tree["dcoord"] for height in up if height > 0)
    highest = max(map(max, tree["dcoord"]))
    room = max(highest - lowest, 1e-3)
    axes.set_ylim(lowest - 0.25 * room, highest + 0.1 * room)
    places = [5 + 10 * index for index in range(len(tree["leaves"]))]
    size = 7 if len(places) <= 2 * ONE_A_ROW else 5.5
    axes.set_xticks(places, [f"{leaf}\n{of_expert[leaf][0]}" for leaf in tree["leaves"]], fontsize=size)
    for label, leaf in zip(axes.get_xticklabels(), tree["leaves"], strict=True):
        label.set_color(of_expert[leaf][1])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0)
