"""Zero-shot scores on a card: the row of an evaluation report that is this very folder's, and what is shown of it."""

import math
from filecmp import cmp
from pathlib import Path
from typing import Any

from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import CheckpointError, UsageError
from ..files import REPORT, found, parse_json, read_json, read_text
from ..harness.report import Model, Score, ZeroShotReport, eval_results, shots, shown
from ..report.card_metadata import model_index, put_block, read_block
from ..report.card_text import plain, put_section, table
from ..report.report import Report

SECTION = "scores"
MODELS = "models"
"""Folder beside the report of what was patched on the way."""


def read_evaluation(path: Path) -> ZeroShotReport:
    """``report.json`` of ``eval/zero_shot.py``.

    Raises:
        CheckpointError: the file cannot be read, or is no such report.
    """
    try:
        text = read_text(path)
        parse_json(text, str(path))
        found = ZeroShotReport.from_json(text)
        _ = found.run["limit"], found.run["seed"], found.run["dtype"], found.run["versions"]["lm_eval"]
        for model in found.models:  # what cannot be shown is no such report
            _ = score_lines(found, model.label), model_index("name", eval_results(found, model.label))
        if not all(math.isfinite(score.value) for score in found.scores):
            raise ValueError("a score is no finite number")
        return found
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no report of zero_shot.py: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise CheckpointError(f"{path}: no report of zero_shot.py ({type(error).__name__}: {error})") from error


def row_of(evaluation: ZeroShotReport, path: Path, folder: Path, label: str | None = None) -> str:
    """The label of the row that scored `folder`.

    A row is the folder's where its fingerprint (configuration, names, shapes and places of all tensors) is, and the
    files were those that lie here, by their bytes, as the results beside the report record them.
    Or where a recipe was applied to a model of that fingerprint, the folder's report names just these, it was not
    trained since, and the model came from a commit of the Hub or the patched one beside the report is equal to it. A
    label that is given stands for the contents of files, which results elsewhere lack, not for the fingerprint.

    Args:
        path: of the report; results lie beside it.

    Raises:
        CheckpointError: no such row.
        UsageError: several, and no label.
    """
    fitting = [model for model in evaluation.models if _fits(evaluation, model, path.parent, folder, label is not None)]
    labels = [model.label for model in fitting if label in (None, model.label)]
    if len(labels) == 1:
        return labels[0]
    known = ", ".join(model.label for model in evaluation.models)
    if labels:
        raise UsageError(f"{path}: several rows are of {folder}: {', '.join(labels)}; --eval-label says which")
    what = f"no row {label} of the fingerprint" if label else "no row of the weights"
    raise CheckpointError(f"{path}: {what} of {folder}; rows: {known}")


def _fits(evaluation: ZeroShotReport, model: Model, results: Path, folder: Path, told: bool) -> bool:
    checkpoint = open_checkpoint(folder)
    if model.fingerprint == checkpoint.fingerprint():
        return told or _same_files(_files_scored(evaluation, model, results), checkpoint)
    report = Report.from_file(found(folder, REPORT))
    made_alike = (
        model.recipe is not None
        and report.training is None
        and report.run.get("source") == model.fingerprint
        and report.run.get("recipe") == model.recipe
        and report.run.get("export_as") is None
    )
    return made_alike and (told or model.commit is not None or _same_bytes(results / MODELS / model.label, folder))


def _same_bytes(scored: Path, folder: Path) -> bool:
    """Whether two folders hold the same weights; False where the first is gone."""
    names = sorted(path.name for path in folder.glob("model*.safetensors"))
    return all((scored / name).is_file() and cmp(scored / name, folder / name, shallow=False) for name in names)


def _files_scored(evaluation: ZeroShotReport, model: Model, results: Path) -> dict[str, Any]:
    """The files that were scored, as of `Identity.record`; empty where no result beside the report says so."""
    for score in evaluation.scores:
        path = results / score.file
        if score.model == model.label and path.is_file():
            try:
                files = read_json(path)["run"]["files"]
            except (CheckpointError, KeyError, TypeError):
                return {}
            return files if isinstance(files, dict) else {}
    return {}


def _same_files(scored: dict[str, Any], checkpoint: Checkpoint) -> bool:
    others, proven = checkpoint.identity.changed(scored)
    return bool(scored) and proven and not others


def with_scores(card: str, evaluation: ZeroShotReport, label: str, name: str) -> str:
    """The card with ``model-index`` in its metadata and a table of the scores; a second time it is replaced.

    Args:
        name: what ``model-index`` calls the model.
    """
    block = read_block(card) | {"model-index": model_index(name, eval_results(evaluation, label))}
    return put_section(put_block(card, block), SECTION, score_lines(evaluation, label))


def score_lines(evaluation: ZeroShotReport, label: str) -> list[str]:
    """A table of one model's scores, with differences to the model it is compared with where that was scored too."""
    run, scores = evaluation.run, [score for score in evaluation.scores if score.model == label]
    limit = "" if run["limit"] is None else f", the first {run['limit']} items of each task only"
    compared = any(score.difference is not None for score in scores)
    original = evaluation.model(label).original
    others = any(score.difference and score.baseline != original for score in scores)
    titles = ["task", "metric", "items", "score"]
    titles += [f"difference to {'the same router without merging' if others else 'the original'}"] if compared else []
    rows = [[*_score_cells(score), *([_difference(score)] if compared else [])] for score in scores]
    paired = "; differences are paired, item by item" if compared else ""
    return [
        "## Scores",
        "",
        f"By lm-eval {plain(run['versions']['lm_eval'])}, seed {plain(run['seed'])}, weights in {plain(run['dtype'])}"
        f"{limit}. Shares in per cent, ± one standard error{paired}.",
        "",
        *table(titles, rows),
    ]


def _score_cells(score: Score) -> list[str]:
    metric = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
    error = "" if score.stderr is None else f" ± {shown(score, score.stderr)}"
    told = "" if score.num_fewshot == 0 else f", {shots(score)} examples"
    return [plain(score.task) + told, plain(metric), f"{score.items:,}", shown(score, score.value) + error]


def _difference(score: Score) -> str:
    found = score.difference
    return "" if found is None else f"{shown(score, found.mean, '+')} ± {shown(score, found.stderr)}"
