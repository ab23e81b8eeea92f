"""Zero-shot scores on a card: the row of an evaluation report for a folder, and its table."""

import math
from filecmp import cmp
from pathlib import Path
from typing import Any

from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import CheckpointError, UsageError
from ..evaluation.store import MODELS
from ..evaluation.table import Table
from ..evaluation.zero_shot_report import (
    Score,
    ScoredModel,
    ZeroShotReport,
    difference_cell,
    eval_results,
    metric_cell,
    shots,
    value_cell,
)
from ..files import REPORT, locate, parse_json, read_json, read_text
from ..record import Report
from ..render import rendered
from ..report.card_metadata import model_index, put_block, read_block
from ..report.card_text import plain, put_section


def read_evaluation(path: Path) -> ZeroShotReport:
    """``report.json`` of ``eval/zero_shot.py``.

    Raises:
        CheckpointError: the file cannot be read, or is not such a report.
    """
    try:
        text = read_text(path)
        parse_json(text, str(path))
        report = ZeroShotReport.from_json(text)
        _ = report.run["limit"], report.run["seed"], report.run["dtype"], report.run["versions"]["lm_eval"]
        for model in report.models:  # a report whose rows cannot be shown is not valid
            _ = score_lines(report, model.label), model_index("name", eval_results(report, model.label))
        if not all(math.isfinite(score.value) for score in report.scores):
            raise ValueError("a score is no finite number")
        return report
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no report of zero_shot.py: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise CheckpointError(f"{path}: no report of zero_shot.py ({type(error).__name__}: {error})") from error


def row_of(evaluation: ZeroShotReport, path: Path, folder: Path, label: str | None = None) -> str:
    """The label of the row that scored `folder`.

    A row fits a folder in two cases. First, both have the same fingerprint (configuration, names, shapes and places of
    all tensors), and the results beside the report record the same bytes of the files. Second, the row's recipe was
    applied to a model of the source's fingerprint, the folder's report states the same, and the folder was not trained
    since. Then the model must come from a commit of the Hub, or the patched model beside the report must be equal to
    the folder. A given `label` replaces the comparison of bytes, which results elsewhere lack, not the fingerprint.

    Args:
        path: path of the report; results lie beside it.

    Raises:
        CheckpointError: no row fits.
        UsageError: several rows fit, and there is no label.
    """
    fitting = [model for model in evaluation.models if _fits(evaluation, model, path.parent, folder, label is not None)]
    labels = [model.label for model in fitting if label in (None, model.label)]
    if len(labels) == 1:
        return labels[0]
    rows = ", ".join(model.label for model in evaluation.models)
    if labels:
        raise UsageError(f"{path}: several rows are of {folder}: {', '.join(labels)}; --eval-label says which")
    reason = f"no row {label} of the fingerprint" if label else "no row of the weights"
    raise CheckpointError(f"{path}: {reason} of {folder}; rows: {rows}")


def _fits(evaluation: ZeroShotReport, model: ScoredModel, results: Path, folder: Path, has_label: bool) -> bool:
    checkpoint = open_checkpoint(folder)
    if model.fingerprint == checkpoint.fingerprint():
        return has_label or _same_files(_files_scored(evaluation, model, results), checkpoint)
    report = Report.from_file(locate(folder, REPORT))
    same_run = (
        model.recipe is not None
        and report.training is None
        and report.run.get("source") == model.fingerprint
        and report.run.get("recipe") == model.recipe
        and report.run.get("export_as") is None
    )
    return same_run and (has_label or model.commit is not None or _same_bytes(results / MODELS / model.label, folder))


def _same_bytes(scored: Path, folder: Path) -> bool:
    """Whether two folders hold the same weights; False if the first is missing."""
    names = sorted(path.name for path in folder.glob("model*.safetensors"))
    return all((scored / name).is_file() and cmp(scored / name, folder / name, shallow=False) for name in names)


def _files_scored(evaluation: ZeroShotReport, model: ScoredModel, results: Path) -> dict[str, Any]:
    """The record of the scored files, from `Identity.record`; empty if no result beside the report has it."""
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
    """The card with ``model-index`` in its metadata and a table of the scores, which replaces an earlier table.

    Args:
        name: name of the model in ``model-index``.
    """
    block = read_block(card) | {"model-index": model_index(name, eval_results(evaluation, label))}
    return put_section(put_block(card, block), "scores", score_lines(evaluation, label))


def score_lines(evaluation: ZeroShotReport, label: str) -> list[str]:
    """A table of a model's scores, with differences to its baseline if that was scored too."""
    scores = [score for score in evaluation.scores if score.model == label]
    titles, rows = ["task", "metric", "items", "score"], [_cells(score) for score in scores]
    compared = any(score.difference is not None for score in scores)
    if compared:
        original = evaluation.model(label).original
        others = any(score.difference and score.baseline != original for score in scores)
        titles.append(f"difference to {'the same router without merging' if others else 'the original'}")
        rows = [[*row, difference_cell(score)] for row, score in zip(rows, scores, strict=True)]
    text = rendered("scores.md", run=evaluation.run, compared=compared, table=Table(titles, rows), plain=plain)
    return text.splitlines()


def _cells(score: Score) -> list[str]:
    examples = "" if score.num_fewshot == 0 else f", {shots(score)} examples"
    return [plain(score.task) + examples, plain(metric_cell(score)), f"{score.items:,}", value_cell(score)]
