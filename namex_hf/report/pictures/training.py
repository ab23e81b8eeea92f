"""A training run: the loss, and what the bargain did meanwhile."""

from typing import Any

from matplotlib.ticker import MaxNLocator

from .picture import COLOURS, MARKS, Material, Picture, figure, plain

PANELS = {
    "loss": "loss, nats a token",
    "aux_loss": "balance loss",
    "bargain/spread": "spread of the Nash weights,\nstd / mean",
    "bargain/drift": "drift of the bases by gradients,\nrelative to their norm",
}


def picture(material: Material) -> Picture | None:
    """A panel a measure over the optimiser's steps; none for a folder that was not trained."""
    training = material.folder.report.training
    if not training or not training.get("loss"):
        return None
    panels = {label: _pairs(training["loss"], key) for key, label in PANELS.items()}
    panels = {label: pairs for label, pairs in panels.items() if pairs}
    drawn = figure(1.2 + 1.9 * ((len(panels) + 1) // 2))
    axes = drawn.subplots((len(panels) + 1) // 2, 2, squeeze=False)
    for place in axes.ravel()[len(panels) :]:
        place.set_visible(False)
    for index, (place, (label, pairs)) in enumerate(zip(axes.ravel(), panels.items(), strict=False)):
        steps, values = zip(*pairs, strict=True)
        place.plot(steps, values, color=COLOURS[index], marker=MARKS[index], markersize=3)
        place.set_xlabel("optimiser step")
        place.set_ylabel(label)
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.ticklabel_format(axis="y", useOffset=False)
        plain(place)
    steps = training["steps"]
    bargains = len(_pairs(training["loss"], "bargain/spread"))
    line = f"The run's {steps} steps: the loss on chats"
    line += (
        "; and, where the bargain was struck again, how unequal its weights became and how far gradients had"
        " taken the base experts from where the bargain puts them (a dot a logged step)."
        if bargains
        else ". No bargain was struck meanwhile."
    )
    return Picture("7-training", "The training run", line, drawn)


def _pairs(history: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry]
