"""How evenly tokens are spread over the experts, before and after."""

import torch

from ...merging.routers import entropy
from ..folder import PatchedFolder
from .hover import HIDDEN
from .picture import COLOURS, MARKS, Material, Picture, figure, from_zero, layers_below, legend_below, line_style, plain

BOTH = "the router, which is the original's"


def picture(material: Material) -> Picture | None:
    """Shares and their entropy by layer; none where no text was read."""
    before = {layer: counts.double() for layer, counts in material.folder.usage.items()}
    answers = material.answers
    after = {layer: one.usage.double() for layer, one in answers.layers.items()} if answers else {}
    grouped = any("groups" in record for record in material.folder.report.layers)
    rerouted = material.folder.recipe.routing.kind != "linear"
    if rerouted or not grouped:  # the linear router, which is what was asked, is the original's
        before, after = before or after, {}
    elif before and answers and answers.sha256 != material.folder.report.run.get("calibration", {}).get("sha256"):
        after = {}  # of another text: no comparison
    names = {"before": "original's router", "after": "this model's router"}
    if not grouped and not rerouted:
        names["before"] = BOTH if material.folder.report.training is None else names["after"]
    entropies = _entropies(material.folder, names, before, after)
    if not before and not entropies:
        return None
    drawn = figure(3.2)
    left, right = drawn.subplots(1, 2)
    for index, (when, shares) in enumerate((("before", before), ("after", after))):
        style = line_style(index) | {"linestyle": "none", "alpha": 0.6}
        relative = {layer: len(counts) * counts / counts.sum().clamp(min=1) for layer, counts in shares.items()}
        for expert in range(max(map(len, relative.values()), default=0)):
            values = {layer: float(one[expert]) for layer, one in relative.items() if expert < len(one)}
            places = [layer + (0.3 * (index - 0.5) if after else 0) for layer in values]
            left.plot(places, [*values.values()], **style, label=f"{HIDDEN}{names[when]}, expert {expert}")
        if relative:
            left.plot([], [], **style, label=names[when])
    for index, (name, values) in enumerate(entropies.items()):
        right.plot(list(values), list(values.values()), color=COLOURS[index], marker=MARKS[index], label=name)
    left.axhline(1, color="#8a8d91", linestyle="--", linewidth=1)
    left.set_ylabel("tokens over an equal share")
    from_zero(left)
    right.set_ylabel("load entropy, 1 = equal shares")
    right.ticklabel_format(axis="y", useOffset=False)
    for axes in (left, right):
        layers_below(axes, list(material.folder.shape.layers))
        legend_below(axes)
        plain(axes)
    line = (
        "Left: a dot an expert, its tokens on calibration text over those of an equal share (dashed: 1). Right: how"
        " even that is, as entropy: 1 where all experts get the same, 0 where one gets everything."
    )
    line += (
        " Every router hears what the layers below it give on once they are patched, unless 'calibrate' is 'before'."
        if material.folder.usage
        else " The text goes through this model's routed experts alone."
    )
    return Picture("6-usage", "Who gets the tokens", line, drawn)


def _entropies(
    folder: PatchedFolder, names: dict[str, str], before: dict[int, torch.Tensor], after: dict[int, torch.Tensor]
) -> dict[str, dict[int, float]]:
    """By line, by layer: of counts, or what the report has measured of another routing."""
    measured = {record["layer"]: record["routing"] for record in folder.report.layers if "routing" in record}
    lines = {
        names[when]: {layer: entropy(counts) for layer, counts in shares.items()}
        for when, shares in (("before", before), ("after", after))
        if shares
    }
    if measured:
        lines = {
            "linear router": {layer: one["load_entropy_linear"] for layer, one in measured.items()},
            f"{folder.recipe.routing.kind} router": {layer: one["load_entropy"] for layer, one in measured.items()},
        }
    return lines
