"""A comparison: checked as a whole, measured cell by cell, put together."""

import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folder import OutputFolder, fault, read_run
from ..checkpoint.source import Checkpoint, open_checkpoint
from ..defaults import SHARD_SIZE
from ..errors import CalibrationError, CheckpointError, RecipeError
from ..families.family import context_of
from ..patching.plan import make_plan
from ..patching.run import keep_apart
from ..patching.text import measures, text_of
from ..progress import ProgressCallback, ProgressEvent
from ..recipe import Recipe
from ..record import versions
from .baseline import is_baseline
from .equal_bytes import Forms, Quantising, SizedRow, quantisings, sized_rows
from .generation import as_chat
from .grid import Cell, slug
from .loading import tokenizer_of
from .measure import CellTask
from .problems.kinds import ALL
from .processes import Outcome, outcomes
from .rows import Row, row_of, with_means
from .settings import Settings
from .store import MODELS, ResultLog, key_of

ORIGINAL, FLOOR = "original", "routed experts removed"
CELLS, WAITING, WORK = "cells/results.jsonl", "waiting", "work"
"""The log of results; folders of models whose quantised forms are not measured yet, and of those under way."""
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
    quantising: Quantising | None = None
    of: str | None = None
    """Label of the model that is quantised."""


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
    def forms(self) -> dict[str, Forms]:
        """The quantised forms of models, by the models' labels."""
        found: dict[str, Forms] = {}
        for label, request in self.requests.items():
            if request.quantising is not None and request.of is not None:
                found[request.of] = (*found.get(request.of, ()), (request.quantising, label))
        return found

    @property
    def run(self) -> dict[str, Any]:
        """What makes results of this run comparable, plain and without local paths."""
        source = {"source": self.checkpoint.fingerprint(), "files": self.checkpoint.identity.record()}
        return {"comparison": 2, **source, **self.settings.identity, "versions": versions()}

    def key(self, label: str) -> str:
        """Of a model's result in the log `CELLS`. The times of the source's files are no part of it."""
        run = {name: value for name, value in self.run.items() if name != "files"}
        return key_of(run, self.requests[label].identity)


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
    sized: list[SizedRow] = field(default_factory=list)
    """Of equal bytes, if that was asked for."""

    @property
    def original(self) -> dict[str, Any]:
        return self.results[ORIGINAL]


def make_plan_of(
    checkpoint: Checkpoint,
    settings: Settings,
    cells: Sequence[Cell],
    quantisers: Sequence[str] = (),
    text: Recipe | None = None,
) -> ComparisonPlan:
    """Check every cell against the model, read the texts, find duplicates.

    Args:
        quantisers: that make further rows of the original and of every result with a stock class.
        text: a recipe that reads the text for GPTQ; None only without that.

    Raises:
        RecipeError, CalibrationError: a recipe that does not fit this model, or text that cannot be had, naming file
            and values.
        FamilyError, CheckpointError: a model that cannot be patched, or has no tokenizer.
    """
    _check_labels(cells)
    tokenizer = tokenizer_of(checkpoint.folder)
    _check_texts(settings, tokenizer)
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
    _check_problems(settings, tokenizer, checkpoint)
    for request in list(requests.values()):
        if quantisers and request.routed and not (request.recipe and request.recipe.own_class):
            how = quantisings(quantisers, text, request.recipe is None)
            requests |= {one.label: one for one in _quantised(request, how, checkpoint, texts)}
    return ComparisonPlan(checkpoint, settings, tuple(cells), requests, same)


def _quantised(
    request: CellRequest,
    how: Sequence[Quantising],
    checkpoint: Checkpoint,
    texts: dict[tuple[Any, ...], dict[str, Any]],
) -> Iterator[CellRequest]:
    """The cells of a model's quantised forms."""
    for one in how:
        text = None if one.text is None else _identity(one.text, checkpoint, texts)["calibration"]
        identity = {**request.identity, "quantised": one.identity(text)}
        label = f"{request.label}, {one.weights}"
        yield CellRequest(label, identity, quantising=one, of=request.label)


def _check_texts(settings: Settings, tokenizer: Any) -> None:
    for name, text in settings.texts.items():
        count = len(tokenizer(text[:BEGINNING], add_special_tokens=False, verbose=False).input_ids)
        if count < 2:
            raise CalibrationError(f"--texts {name} has {count} tokens; accepted: texts of 2 or more")


def _check_problems(settings: Settings, tokenizer: Any, checkpoint: Checkpoint) -> None:
    """Whether chats can be written, and the longest problem and its answer fit into what the model attends to."""
    longest = context_of(checkpoint.config)
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
    with folder.claimed(how.overwrite), ResultLog(out / CELLS, {"comparison": 1}) as log:
        shutil.rmtree(out / WORK, ignore_errors=True)  # of a run that was killed
        stays = _staying(plan, log, out, how)
        results = {
            label: log[key]
            for label, request in plan.requests.items()
            if (key := plan.key(label)) in log and _is_there(request, stays.get(label))
        }
        for label in results:
            progress(ProgressEvent(KNOWN, model=label))
        failed: dict[str, str] = {}
        for labels in _phases(plan):
            failed |= _orphans(plan, labels, results, failed)
            waiting = [plan.requests[label] for label in labels if label not in {*results, *failed}]
            tasks = [_task(request, plan, out, how.jobs, stays) for request in waiting]
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
                        log.add({plan.key(label): results[label]})
                    _clear(outcome, label in stays)
                    progress(ProgressEvent(FAILED if outcome.error else ENDED, model=label))
            if ORIGINAL in failed:
                if not log and not list((out / WORK).glob("*.log")):
                    folder.remove()
                raise CheckpointError(f"{plan.checkpoint.name} cannot be scored as it is: {failed[ORIGINAL]}")
        shutil.rmtree(out / WAITING, ignore_errors=True)
        if not failed:
            shutil.rmtree(out / WORK, ignore_errors=True)
    return assemble(plan, results, failed)


def _phases(plan: ComparisonPlan) -> list[list[str]]:
    """Labels in the order in which they are measured: the original, other models, quantised forms of them."""
    others = [label for label, request in plan.requests.items() if label != ORIGINAL and request.of is None]
    return [[ORIGINAL], others, [label for label, request in plan.requests.items() if request.of is not None]]


def _staying(plan: ComparisonPlan, log: ResultLog, out: Path, how: RunOptions) -> dict[str, Path]:
    """Folders, by label, of the models that stay when they are measured, some until their quantised forms are, too."""
    awaited = {one.of for one in plan.requests.values() if one.of and plan.key(one.label) not in log}
    labels = [label for label, one in plan.requests.items() if one.recipe and (how.keep or label in awaited)]
    return {label: out / (MODELS if how.keep else WAITING) / slug(label) for label in labels}


def _orphans(
    plan: ComparisonPlan, labels: Sequence[str], results: Container[str], failed: Container[str]
) -> dict[str, str]:
    """Quantised forms of a model that failed, and why they fail."""
    waiting = [plan.requests[label] for label in labels if label not in results]
    return {one.label: f"{one.of} failed" for one in waiting if one.of is not None and one.of in failed}


def _is_there(request: CellRequest, place: Path | None) -> bool:
    """Whether the model is there, if it is to stay. Args: place, of a model that stays."""
    if place is None:
        return True
    stored = read_run(place)  # of a file that had other fields then, perhaps
    return stored is not None and stored.get("recipe") == request.identity["recipe"] and not fault(place)


def _task(request: CellRequest, plan: ComparisonPlan, out: Path, jobs: int, stays: Mapping[str, Path]) -> CellTask:
    """Args: stays, folders of the models that stay."""
    name = slug(request.label)
    source = stays.get(request.of or "")
    checkpoint = plan.checkpoint if source is None else open_checkpoint(source)
    is_written = request.recipe is not None or request.quantising is not None
    folder = stays.get(request.label, out / WORK / name) if is_written else None
    threads, log = max(1, torch.get_num_threads() // jobs), out / WORK / f"{name}.log"
    model = (request.recipe, request.routed, folder, threads, request.quantising)
    return CellTask(request.label, log, checkpoint, plan.settings, *model)


def _prepare(task: CellTask) -> None:
    task.log.parent.mkdir(exist_ok=True)
    if task.out is not None:  # left by a run that was killed
        shutil.rmtree(task.out, ignore_errors=True)
        task.out.parent.mkdir(exist_ok=True)


def _clear(outcome: Outcome, stays: bool) -> None:
    """Remove the model, unless it is to stay, and the log, unless it has a traceback."""
    folder = outcome.task.out
    if folder is not None and (outcome.error or not stays):
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
    sized = sized_rows(plan.forms, results, ORIGINAL)
    return Comparison(plan, dict(results), dict(failed), rows + with_means(pairs), sized)


def _unmerged(recipe: Mapping[str, Any], plan: ComparisonPlan, results: Mapping[str, Any]) -> Cell | None:
    """The cell of the same router that merges nothing, if it was measured."""
    for cell in plan.cells:
        label = plan.same[cell.label]
        if label in results and is_baseline(plan.requests[label].identity["recipe"], recipe):
            return cell
    return None
