"""A comparison: checked as a whole, measured cell by cell, put together."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folder import OutputFolder, fault, read_run
from ..checkpoint.source import Checkpoint
from ..defaults import SHARD_SIZE
from ..errors import CalibrationError, CheckpointError, RecipeError
from ..patching.patch import _keep_apart as keep_apart
from ..patching.plan import make_plan
from ..patching.text import measures, text_of
from ..progress import ProgressCallback, ProgressEvent
from ..recipe import Recipe
from ..record import versions
from .baseline import is_baseline
from .generation import as_chat
from .grid import Cell, slug
from .loading import tokenizer_of
from .measure import CellTask
from .problems.kinds import ALL
from .processes import Outcome, outcomes
from .rows import Row, row_of, with_means
from .settings import Settings
from .store import CELLS, CellFiles

ORIGINAL, FLOOR = "original", "routed experts removed"
MODELS, WORK = "models", "work"
BEGINNING = 1000  # characters that are looked at to see whether a text is one
KNOWN, BEGINS, ENDED, FAILED = "known", "begins", "ended", "failed"
"""Stages of a model as a whole, beside those of its patching and its scores."""


@dataclass(frozen=True)
class CellRequest:
    """One model to be measured, and what determines it besides the run."""

    label: str
    identity: dict[str, Any]
    recipe: Recipe | None = None
    routed: bool = True


@dataclass(frozen=True)
class ComparisonPlan:
    """A checked comparison."""

    checkpoint: Checkpoint
    settings: Settings
    cells: tuple[Cell, ...]
    requests: dict[str, CellRequest]
    """Every model, once, by the label of its first cell."""
    same: dict[str, str]
    """By a cell's label: that of the cell with the same recipe that is run; its own where it is the first."""

    @property
    def run(self) -> dict[str, Any]:
        """What makes results of this run comparable, plain and without local paths."""
        source = {"source": self.checkpoint.fingerprint(), "files": self.checkpoint.identity.record()}
        return {"comparison": 2, **source, **self.settings.identity, "versions": versions()}


@dataclass(frozen=True)
class RunOptions:
    """Execution options; they do not affect scores."""

    jobs: int = 1
    keep: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Comparison:
    """A comparison with its results."""

    plan: ComparisonPlan
    results: dict[str, dict[str, Any]]
    """By label, of those in `ComparisonPlan.requests` that did not fail."""
    failed: dict[str, str]
    """Reasons by label."""
    rows: list[Row] = field(default_factory=list)
    """The original, the floor, then the grid's."""

    @property
    def original(self) -> dict[str, Any]:
        return self.results[ORIGINAL]


def make_plan_of(checkpoint: Checkpoint, settings: Settings, cells: Sequence[Cell]) -> ComparisonPlan:
    """Check every cell against the model, read the texts, find duplicates.

    Raises:
        RecipeError, CalibrationError: a recipe that does not fit this model, or text that cannot be had, naming file
            and values.
        FamilyError, CheckpointError: a model that cannot be patched, or has no tokenizer.
    """
    _check_labels(cells)
    tokenizer = tokenizer_of(checkpoint.folder)
    _check_texts(settings, tokenizer)
    _check_problems(settings, tokenizer, checkpoint)
    requests = {
        ORIGINAL: CellRequest(ORIGINAL, {"reference": ORIGINAL}),
        FLOOR: CellRequest(FLOOR, {"reference": FLOOR}, routed=False),
    }
    texts: dict[tuple[Any, ...], dict[str, Any]] = {}
    first: dict[str, str] = {}
    same = {}
    for cell in cells:
        try:
            patch = make_plan(checkpoint, cell.recipe, SHARD_SIZE, reads_text=False)
            identity = _identity(patch.recipe, checkpoint, texts)
        except (RecipeError, CalibrationError) as error:
            raise type(error)(f"{cell.where}: {error}") from error
        same[cell.label] = first.setdefault(repr(identity), cell.label)
        if same[cell.label] == cell.label:
            requests[cell.label] = CellRequest(cell.label, identity, cell.recipe)
    return ComparisonPlan(checkpoint, settings, tuple(cells), requests, same)


def _check_texts(settings: Settings, tokenizer: Any) -> None:
    for name, text in settings.texts.items():
        found = len(tokenizer(text[:BEGINNING], add_special_tokens=False, verbose=False).input_ids)
        if found < 2:
            raise CalibrationError(f"--texts {name} has {found} tokens; accepted: texts of 2 or more")


def _check_problems(settings: Settings, tokenizer: Any, checkpoint: Checkpoint) -> None:
    """Whether chats can be written, and the longest problem and its answer fit into what the model attends to."""
    longest = checkpoint.config.get("max_position_embeddings")
    for kind, problems in settings.made().items():
        if problems[0].turns and not tokenizer.chat_template:
            raise CheckpointError(f"{checkpoint.name}: its tokenizer has no chat template; --kinds {kind} needs one")
        most = max(problems, key=lambda one: sum(len(text) for _, text in one.turns) or len(one.prompt))
        text = as_chat(tokenizer, most.turns) if most.turns else most.prompt
        count = len(tokenizer(text, verbose=False).input_ids) + ALL[kind].NEW_TOKENS
        if longest is not None and count > longest:
            raise CheckpointError(
                f"{checkpoint.name} attends to {longest} tokens; --kinds {kind} needs {count} with the answer"
            )


def _check_labels(cells: Sequence[Cell]) -> None:
    places: dict[str, str] = {}
    for cell in cells:
        other = places.setdefault(cell.slug, cell.label)
        if other != cell.label or cell.label in (ORIGINAL, FLOOR):
            raise RecipeError(f"{cell.where}: label '{cell.label}' is that of another row; rename the file")


def _identity(recipe: Recipe, checkpoint: Checkpoint, texts: dict[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """What determines a cell besides the run; texts that were read before are not read again."""
    if not recipe.needs_text:
        return {"recipe": recipe.to_dict()}
    source = recipe.calibration, recipe.seed, measures(recipe)
    if source not in texts:
        text = text_of(recipe, checkpoint)
        texts[source] = {"name": text.name, "sha256": text.sha256, "tokens": text.tokens}
    return {"recipe": recipe.with_text(texts[source]["name"]).to_dict(), "calibration": texts[source]}


def compare(plan: ComparisonPlan, out: Path, how: RunOptions, progress: ProgressCallback) -> Comparison:
    """Measure what is not measured yet, the original first, each cell in a process of its own.

    A cell that fails is reported and left out; the others go on. A cell that a kill interrupted begins anew, so that
    its time is that of one run.

    Raises:
        OutputError: the folder holds another comparison or something else, or is in use.
        CheckpointError: the original cannot be scored; nothing of a folder without finished cells is left.
    """

    def begin(task: CellTask) -> None:
        _prepare(task)
        progress(ProgressEvent(BEGINS, model=task.label))

    identity = plan.checkpoint.identity
    folder = OutputFolder(out, plan.run, identity)
    keep_apart(plan.checkpoint, out)
    folder.check(how.overwrite)
    with folder.claimed(how.overwrite):
        shutil.rmtree(out / WORK, ignore_errors=True)  # of a run that was killed
        store = CellFiles(out, plan.run)
        known = {label: _finished(plan, label, store, out, how) for label in plan.requests}
        results = {label: found for label, found in known.items() if found is not None}
        for label in results:
            progress(ProgressEvent(KNOWN, model=label))
        failed: dict[str, str] = {}
        for labels in ([ORIGINAL], [label for label in plan.requests if label != ORIGINAL]):
            tasks = [_task(plan.requests[label], plan, out, how) for label in labels if label not in results]
            with closing(outcomes(tasks, how.jobs, begin, progress)) as ended:
                for outcome in ended:
                    label = outcome.task.label
                    if outcome.result is None:
                        failed[label] = str(outcome.error)
                    else:
                        results[label] = {**outcome.result, "at_once": how.jobs}
                        if label == ORIGINAL:
                            identity.settle()  # what was read just now is read again from memory
                            identity.save_digests(folder.state)
                        identity.check()
                        store.write(plan.requests[label].identity, label, results[label])
                    _clear(outcome, how)
                    progress(ProgressEvent(FAILED if outcome.error else ENDED, model=label))
            if ORIGINAL in failed:
                if not (out / CELLS).is_dir() and not list((out / WORK).glob("*.log")):
                    folder.remove()
                raise CheckpointError(f"{plan.checkpoint.name} cannot be scored as it is: {failed[ORIGINAL]}")
        if not failed:
            shutil.rmtree(out / WORK, ignore_errors=True)
    return assemble(plan, results, failed)


def _finished(plan: ComparisonPlan, label: str, store: CellFiles, out: Path, how: RunOptions) -> dict[str, Any] | None:
    """What was measured; None also where the model is to stay and is not there."""
    request = plan.requests[label]
    if how.keep and request.recipe is not None:
        place = out / MODELS / slug(label)
        stored = read_run(place)  # of a file that had other fields then, perhaps
        if stored is None or stored.get("recipe") != request.identity["recipe"] or fault(place):
            return None
    return store.read(request.identity)


def _task(request: CellRequest, plan: ComparisonPlan, out: Path, how: RunOptions) -> CellTask:
    name = slug(request.label)
    folder = None if request.recipe is None else out / (MODELS if how.keep else WORK) / name
    threads = max(1, torch.get_num_threads() // how.jobs)
    log = out / WORK / f"{name}.log"
    return CellTask(request.label, log, plan.checkpoint, plan.settings, request.recipe, request.routed, folder, threads)


def _prepare(task: CellTask) -> None:
    task.log.parent.mkdir(exist_ok=True)
    if task.out is not None:  # left by a run that was killed
        shutil.rmtree(task.out, ignore_errors=True)
        task.out.parent.mkdir(exist_ok=True)


def _clear(outcome: Outcome, how: RunOptions) -> None:
    """Remove the model, unless it is to stay, and the log, unless it has a traceback."""
    folder = outcome.task.out
    if folder is not None and (outcome.error or not how.keep):
        shutil.rmtree(folder, ignore_errors=True)
    if not outcome.fault:
        outcome.task.log.unlink(missing_ok=True)


def assemble(plan: ComparisonPlan, results: Mapping[str, dict[str, Any]], failed: Mapping[str, str]) -> Comparison:
    """The rows of what was measured."""
    original = results[ORIGINAL]
    rows = [row_of(label, results[label], original) for label in (ORIGINAL, FLOOR) if label in results]
    pairs = []
    for cell in plan.cells:
        label = plan.same[cell.label]
        if label in results:
            recipe = plan.requests[label].identity["recipe"]
            row = row_of(cell.label, results[label], original, cell, recipe)
            if unmerged := _unmerged(recipe, plan, results):
                beside = row_of(cell.label, results[label], results[plan.same[unmerged.label]], cell)
                row = replace(row, unmerged=beside, unmerged_title=unmerged.line)
            pairs.append((cell, row))
    return Comparison(plan, dict(results), dict(failed), rows + with_means(pairs))


def _unmerged(recipe: Mapping[str, Any], plan: ComparisonPlan, results: Mapping[str, Any]) -> Cell | None:
    """The cell of the same router that merges nothing, if it was measured."""
    for cell in plan.cells:
        label = plan.same[cell.label]
        if label in results and is_baseline(plan.requests[label].identity["recipe"], recipe):
            return cell
    return None
