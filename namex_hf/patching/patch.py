"""`patch_checkpoint`: a checkpoint in, a patched model folder out, two layers in memory at most."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..calibration.sources import Texts
from ..checkpoint.companions import companions
from ..checkpoint.resolve import resolve
from ..checkpoint.source import Checkpoint
from ..checkpoint.tokenizer_code import tokenizer_code
from ..defaults import SHARD_SIZE
from ..files import CARD, CONFIG, REPORT, locate, write_text
from ..progress import ProgressCallback, no_progress
from ..recipe import Recipe
from ..record import Report
from ..report.card import card
from .effort import effort_of
from .estimate import peak_bytes, space_needed
from .plan import Plan, make_plan
from .run import Run
from .together import run_all


def patch_checkpoint(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    texts: Texts | None = None,
    revision: str | None = None,
    export_as: str | None = None,
    like: str | Path | None = None,
    scores: str | Path | None = None,
    moments: str | Path | None = None,
    shard_size: str | int = SHARD_SIZE,
    overwrite: bool = False,
    verify: bool = False,
    progress: ProgressCallback = no_progress,
) -> Report:
    """Patch a checkpoint out of core.

    A run that was killed is continued by the same call; on a folder that is complete already nothing is done and its
    report is returned. A finished folder that lost a file is made anew.

    Args:
        source: a local folder, the name of a packaged model, or a Hub id.
        out: a folder that is new, empty, or of the same run.
        texts: calibration text, in the place of what the recipe names: a list of texts, or of chats, each a list of
            messages. They are part of the run: another list is another run.
        export_as: ``qwen2_moe``: write a grouped DeepSeek-MoE in the stock Qwen2-MoE form.
        like: a folder that ``moments`` of another model of this shape has filled, such as the base model of this one.
            They stand for the text.
        scores: a folder that was patched from the same source on the same text. Its scores of experts stand for the
            text, for recipes that weigh experts by it alone (`Recipe.reads_scores_alone`).
        moments: a folder for second moments of neurons, of one source and text. They are saved there and, where they
            are there, stand for the text: results of several widths from one reading (`Recipe.reads_moments_alone`).
        shard_size: of the shards that are written anew; unchanged shards are copied as they are.
        overwrite: make the folder anew, whichever run it is of (never one that is not ours).
        verify: read all files of a folder that is complete, and make it anew where one has another hash.
        progress: called after every layer, and after every stage of one that text is read for; ``done`` is bytes.

    Memory: one layer's experts and, for ``grouped``, up to one layer of merged ones.

    Raises:
        RecipeError, FamilyError, CheckpointError, CalibrationError: bad input; no output folder is left.
        OutputError: the folder cannot be used, or the disk is full (the folder stays and can be continued).
    """
    checkpoint = resolve(source, revision)
    like = None if like is None else Path(like)
    plan = make_plan(checkpoint, recipe or Recipe(), shard_size, export_as, texts=texts, like=like)
    known, measured = (None if folder is None else Path(folder) for folder in (scores, moments))
    [report] = run_all([Run(plan, Path(out), known, measured, overwrite, verify)], progress)
    return report


def describe(plan: Plan, out: Path, saves_moments: bool = False) -> dict[str, Any]:
    """What a run would do, for ``--dry-run``."""
    place = out
    while not place.exists():
        place = place.absolute().parent
    return {
        "layers": len(plan.shape.layers),
        "experts": plan.shape.experts,
        "kept": plan.experts,
        "width": plan.width,
        "share": plan.experts * plan.width / (plan.shape.experts * plan.shape.width),
        "bytes_in": plan.checkpoint.size,
        "bytes_out": plan.bytes_out,
        "space_needed": space_needed(plan, saves_moments),
        "free": shutil.disk_usage(place).free,
        "peak_bytes": peak_bytes(plan),
        "carried": _carried(plan.checkpoint),
        "calibration_tokens": plan.recipe.calibration.tokens if plan.reads_text else None,
        "curvature_parameters": plan.curvature_parameters,
        "effort": effort_of(plan),
        "device": plan.recipe.device,
    }


def _carried(checkpoint: Checkpoint) -> list[str]:
    """Names of what is carried over, of a folder or of a repository of which headers were fetched."""
    if checkpoint.elsewhere is not None:
        return list(checkpoint.elsewhere)
    folder = checkpoint.folder
    return [path.relative_to(folder).as_posix() for path in (*companions(folder), *tokenizer_code(folder))]


def rewrite_report(out: Path, report: Report) -> None:
    """Put a report with more in it (perplexity, say) in the place of the old one, and into the card."""
    config = json.loads((out / CONFIG).read_text("utf-8"))
    write_text(out / CARD, card(report, config, out))
    write_text(locate(out, REPORT), report.to_json())
