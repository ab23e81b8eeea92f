"""The error of every layer on calibration text, after each stage of the work on it."""

from .picture import Material, Picture, figure, from_zero, layers_below, line_style, plain

STAGES = {
    "merged": "experts merged",
    "router": "router fitted",
    "down": "down refitted",
    "layer": "whole mixture fitted",
    "residual": "this model: residual",
    "soft": "this model: soft",
}


def picture(material: Material) -> Picture | None:
    """A line a stage, the last stage of a name where there are rounds; none where no text was read."""
    by_stage: dict[str, dict[int, float]] = {}
    for record in material.folder.report.layers:
        for one in record.get("errors", []):
            by_stage.setdefault(STAGES.get(one["stage"], one["stage"]), {})[record["layer"]] = one["error"]
    if not by_stage:
        return None
    drawn = figure(3.2)
    axes = drawn.subplots()
    for index, (stage, errors) in enumerate(by_stage.items()):
        axes.plot(list(errors), list(errors.values()), **line_style(index), label=stage)
    layers_below(axes, list(material.folder.shape.layers))
    axes.set_ylabel("squared error of the routed output,\nrelative to the output")
    from_zero(axes)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    plain(axes)
    line = (
        "How far a layer's routed output on calibration text is from the one wanted: 0 is the same output, 1 as far off"
        " as no output at all. Lower is better; lines of later stages lie below earlier ones where the stage helped."
    )
    if material.folder.recipe.to_dict()["target"] == "model":
        line += " Wanted is what leads back to the original's hidden states, errors of the layers below made up for."
    return Picture("6-damage", "What each layer lost", line, drawn)
