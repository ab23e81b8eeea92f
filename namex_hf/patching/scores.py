"""What another run measured on the same source and text: several results from one reading of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.identity import differing
from ..errors import CheckpointError, OutputError, RecipeError, UsageError
from ..files import MOMENTS, REPORT, locate, read_json
from ..merging.weightings import ExpertStatistics
from ..recipe import Recipe
from ..record import Report
from .moments import MomentsFolder, check_reads_moments, is_complete, shape_record
from .plan import Plan

Scores = dict[int, ExpertStatistics]
DEPENDS_ON = ("source", "files", "calibration")
"""Fields of a run on which scores and moments depend, beside when the text is read."""


def check_reads_scores(recipe: Recipe) -> None:
    """Raises:
    RecipeError: the recipe needs more of the text than scores.
    """
    if not recipe.reads_scores_alone:
        stated = recipe.to_dict()
        fields = ("merge", "calibrate", "grouping", "fit", "down", "align", "curvature", "routing")
        raise RecipeError(
            "--scores stands for the text where experts are weighed by it alone: merge 'grouped', calibrate 'before', "
            "grouping weights or none, without fit, refit, align, curvature or another routing; found "
            + ", ".join(f"{name}={stated[name]}" for name in fields)
        )


def read_scores(folder: Path, plan: Plan) -> Scores:
    """The scores of every MoE layer, from the report of a patched folder.

    Raises:
        RecipeError: the recipe needs more of the text than scores.
        CheckpointError: the folder has no scores, not all that the recipe needs, or those of another source or text.
    """
    check_reads_scores(plan.recipe)
    path = locate(folder, REPORT)
    if not path.is_file():
        raise CheckpointError(f"--scores {folder} has no {REPORT}; accepted: a folder that namex-patch has written")
    report = Report.from_file(path)
    recorded, current = ({name: run.get(name) for name in DEPENDS_ON} for run in (report.run, plan.run))
    _check_same(f"--scores {folder} was made", recorded, current, plan)
    when = report.run["recipe"].get("calibrate")
    if when != "before":
        raise CheckpointError(f"--scores {folder} has scores of calibrate {when!r}; accepted: before")
    scores = {record["layer"]: _scores(record) for record in report.layers if "mass" in record}
    lacking = [layer for layer in plan.shape.layers if layer not in scores]
    weighs_by = plan.recipe.merge.weights_by
    if lacking or (weighs_by == "saliency" and any(one.saliency is None for one in scores.values())):
        raise CheckpointError(f"--scores {folder} has no {weighs_by} of every layer: its recipe did not measure it")
    return scores


def _check_same(what: str, recorded: Mapping[str, Any], current: Mapping[str, Any], plan: Plan) -> None:
    if (difference := differing(recorded, current, plan.checkpoint.identity)) or not difference.proven:
        raise CheckpointError(f"{what} with another {difference or 'source'}")


def _scores(record: dict[str, Any]) -> ExpertStatistics:
    usage, mass, saliency, peaks = (
        None if (values := record.get(name)) is None else torch.tensor(values, dtype=torch.float64)
        for name in ("usage", "mass", "saliency", "peaks")
    )
    assert usage is not None
    return ExpertStatistics(usage, saliency, mass, peaks)


def check_moments(plan: Plan) -> None:
    """What can be said before a folder of moments is opened.

    Raises:
        UsageError: those of another model stand for the text already.
        RecipeError: the recipe needs more of the text than moments.
    """
    if plan.like is not None:
        raise UsageError("--like reads what --moments has saved of another model: one of the two")
    check_reads_moments(plan.recipe, "--moments")


def open_moments(folder: Path, plan: Plan) -> MomentsFolder:
    """The moments of a plan's source and text, or a folder where they can be saved.

    Raises:
        UsageError, RecipeError: as of `check_moments`.
        CheckpointError: these are of another source, text, or device.
        OutputError: the folder holds something else.
    """
    check_moments(plan)
    recipe = plan.recipe
    run = {name: plan.run[name] for name in DEPENDS_ON} | {"shape": shape_record(plan.shape)}
    run |= {"error_weights": recipe.calibration.error_weights, "device": plan.device}
    if (folder / MOMENTS).is_file():
        _check_same(f"--moments {folder} were measured", read_json(folder / MOMENTS), run, plan)
    elif folder.exists() and any(folder.iterdir()):
        raise OutputError(f"--moments {folder} holds other files; accepted: a new folder, or one of --moments")
    return MomentsFolder(folder, run, is_complete(folder, plan.shape.layers), recipe.device)
