"""Models x tasks: patched where need be, scored, compared."""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import datasets
import lm_eval
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ..errors import OutputError
from ..files import check_name
from ..patching.patch import run_plan
from ..progress import ProgressCallback
from ..record import versions
from .candidates import Candidate
from .checks import check_answers
from .language_model import NamexLM
from .paper import Paper
from .samples import RESULTS, ScoreItems, items, members
from .statistics import error_of, paired
from .task_run import ANSWERS, finished, score
from .tasks import LoadedTask
from .zero_shot_report import Score, ScoredModel, ZeroShotReport

MODELS = "models"
"""Folder of the models that were patched on the way."""


@dataclass(frozen=True)
class ZeroShotOptions:
    """How to score, whatever the model."""

    out: Path
    device: str = "cpu"
    dtype: str = "auto"
    batch_size: str = "auto"
    num_fewshot: int = 0
    limit: int | None = None
    seed: int = 1234
    parallelize: bool = False
    trust_remote_code: bool = False
    overwrite: bool = False
    stage: str = "zero-shot"


ProgressBar = Callable[[str], AbstractContextManager[ProgressCallback]]
"""Opens a bar under a title."""


def all_versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        **versions(),
        "lm_eval": lm_eval.__version__,
        "datasets": datasets.__version__,
        "accelerate": accelerate.__version__,
    }


def identity(row: Candidate, task: LoadedTask, options: ZeroShotOptions) -> dict[str, Any]:
    """What makes a model's score on a task this one and no other, plain."""
    return {
        **row.identity,
        "num_fewshot": task.shots,
        "task": task.digest,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "limit": options.limit,
        "seed": options.seed,
        "device": torch.device(options.device).type,
        "versions": all_versions(),
    }


def is_first() -> bool:
    """Whether this process is the one that writes and talks."""
    return os.environ.get("RANK", "0") == "0"


def run(
    rows: list[Candidate], tasks: list[LoadedTask], options: ZeroShotOptions, paper: Paper, bar: ProgressBar
) -> ZeroShotReport:
    """Score every model on every task; what an earlier run of the same has finished is taken from its files.

    One model is in memory at a time.

    Raises:
        OutputError: the output folder has another run's results, or a name that no folder can have.
        CheckpointError, TaskError: as of `check_answers`.
    """
    check_name(options.out, OutputError)
    known = {}
    for row in rows:
        for task in tasks:
            folder = options.out / row.label / task.label
            if options.overwrite and is_first():
                _forget(folder)
            known[row.label, task.label] = None if options.overwrite else _finished(folder, row, task, options)
    wanted = {row.label: [task for task in tasks if known[row.label, task.label] is None] for row in rows}
    for row in rows:
        if wanted[row.label]:
            check_answers(row.checkpoint, wanted[row.label], options.limit, options.trust_remote_code)
    _everyone()
    for row in rows:
        if wanted[row.label]:
            known.update(_scored(row, wanted[row.label], options, bar))
    return assemble(rows, tasks, known, options, paper)


def _finished(folder: Path, row: Candidate, task: LoadedTask, options: ZeroShotOptions) -> dict[str, Any] | None:
    return finished(folder, identity(row, task, options), row.checkpoint.identity)


def _scored(
    row: Candidate, tasks: list[LoadedTask], options: ZeroShotOptions, bar: ProgressBar
) -> dict[tuple[str, str], Any]:
    model = NamexLM(
        str(_folder(row, options, bar).resolve()),
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        parallelize=options.parallelize,
        trust_remote_code=options.trust_remote_code,
    )
    row.checkpoint.identity.settle()  # what was read just now is read again from memory
    found = {}
    for task in tasks:
        with bar(f"{row.label}, {task.label}") as model.progress:
            folder = options.out / row.label / task.label
            known = identity(row, task, options)
            found[row.label, task.label] = score(model, task, folder, known, options.limit, options.seed)
    return found


def _folder(row: Candidate, options: ZeroShotOptions, bar: ProgressBar) -> Path:
    """Where the model lies; a recipe is applied first, by one process, and a run that was killed goes on."""
    if row.plan is None:
        return row.checkpoint.folder
    out = options.out / MODELS / row.label
    if is_first():
        with bar(f"{row.label}, patching") as progress:
            run_plan(row.plan, out, overwrite=options.overwrite, progress=progress)
    _everyone()
    return out


def _everyone() -> None:
    """Wait for the other processes of ``accelerate launch``."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The time that one process patches for must not count as a hang.
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))]).wait_for_everyone()


def _forget(folder: Path) -> None:
    """Remove a task's results and answers.

    Raises:
        OutputError: the folder is not ours.
    """
    if not folder.exists():
        return
    if not (folder / RESULTS).is_file() and not (folder / ANSWERS).is_dir():
        raise OutputError(f"{folder} holds something else; --overwrite replaces results of this script alone")
    shutil.rmtree(folder)


def assemble(
    rows: list[Candidate],
    tasks: list[LoadedTask],
    known: dict[tuple[str, str], Any],
    options: ZeroShotOptions,
    paper: Paper,
) -> ZeroShotReport:
    """The report, from the files of all runs."""
    scores = [one for task in tasks for row in rows for one in _scores(row, task, known, options, paper)]
    models = [
        ScoredModel(
            row.label,
            row.checkpoint.name,
            row.checkpoint.commit,
            row.checkpoint.fingerprint(),
            row.recipe,
            row.original,
            options.dtype,
        )
        for row in rows
    ]
    told = asdict(options)
    for name in ("out", "overwrite"):
        told.pop(name)
    return ZeroShotReport({**told, "versions": all_versions()}, models, scores)


def _scores(
    row: Candidate, task: LoadedTask, known: dict[tuple[str, str], Any], options: ZeroShotOptions, paper: Paper
) -> Iterable[Score]:
    results = known[row.label, task.label]
    for name in [task.name] if task.name in results["results"] else sorted(task.tasks):
        for metric, keep in metrics(results["results"][name]):
            own = items(options.out / row.label / task.label, results, name, metric, keep)
            before = None
            if row.baseline is not None:
                folder = options.out / row.baseline / task.label
                before = items(folder, known[row.baseline, task.label], name, metric, keep)
            comparable = own is not None and before is not None and own.hashes == before.hashes and len(own.values) > 1
            yield Score(
                row.label,
                name,
                metric,
                keep,
                results["results"][name][f"{metric},{keep}"],
                _stderr(results["results"][name].get(f"{metric}_stderr,{keep}"), own),
                sum(results["n-samples"][one]["effective"] for one in members(results, name)),
                _shots(results, name),
                results["higher_is_better"].get(name, {}).get(metric, True) is not False,
                task.data,
                f"{row.label}/{task.label}/{RESULTS}",
                row.baseline,
                paired(own.values, before.values) if comparable and own and before else None,
                paper.score(row.checkpoint.config, row.recipe, name),
            )


def _shots(results: dict[str, Any], name: str) -> int | None:
    """Worked examples of a task; of a group None where its tasks have different numbers."""
    numbers = {results["n-shot"].get(task) or 0 for task in members(results, name)}
    return numbers.pop() if len(numbers) == 1 else None


def metrics(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Metric and filter of every number of a task."""
    pairs = [tuple(key.split(",", 1)) for key, value in found.items() if "," in key and isinstance(value, float)]
    return [(metric, keep) for metric, keep in pairs if not metric.endswith("_stderr")]


def _stderr(given: Any, own: ScoreItems | None) -> float | None:
    """lm-eval's own, or the items' where it gives none."""
    if isinstance(given, float):
        return given
    return None if own is None else error_of([own.values])
