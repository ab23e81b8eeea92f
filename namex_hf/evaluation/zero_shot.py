"""Models x tasks: patched where need be, scored, compared."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ..errors import OutputError
from ..files import check_name
from ..patching.run import Run
from ..patching.together import run_all
from ..progress import ProgressCallback
from ..record import versions
from .candidates import Candidate
from .checks import check_answers
from .language_model import NamexLM
from .paper import Paper
from .samples import RESULTS, items, members, metrics, shots_of
from .statistics import error_of, paired
from .store import MODELS
from .task_run import ANSWERS, finished, score
from .tasks import LoadedTask
from .zero_shot_report import Score, ScoredModel, ZeroShotReport


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
    apply_chat_template: bool = False
    parallelize: bool = False
    trust_remote_code: bool = False
    overwrite: bool = False
    stage: str = "zero-shot"


IDENTITY = ("dtype", "batch_size", "limit", "seed", "apply_chat_template")
"""Options on which scores depend, besides what the tasks say."""
ProgressBar = Callable[[str], AbstractContextManager[ProgressCallback]]
"""Opens a bar under a title."""


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class ZeroShotRun:
    """Models x tasks."""

    rows: list[Candidate]
    tasks: list[LoadedTask]
    options: ZeroShotOptions
    paper: Paper
    bar: ProgressBar
    versions: dict[str, str] = field(default_factory=lambda: versions("lm_eval", "datasets", "accelerate"))
    """Of what the numbers depend on."""

    def report(self) -> ZeroShotReport:
        """Score every model on every task; what an earlier run of the same has finished is taken from its files.

        One model is in memory at a time.

        Raises:
            OutputError: the output folder has another run's results, or a name that no folder can have.
            CheckpointError, TaskError: as of `check_answers`.
        """
        check_name(self.options.out, OutputError)
        results = {(row.label, task.label): self._finished(row, task) for row in self.rows for task in self.tasks}
        missing = [
            (row, tasks)
            for row in self.rows
            if (tasks := [task for task in self.tasks if results[row.label, task.label] is None])
        ]
        for row, tasks in missing:
            check_answers(
                *(row.checkpoint, tasks, self.options.limit, self.options.trust_remote_code),
                chat=self.options.apply_chat_template,
            )
        _wait_for_all()
        for row, tasks in missing:
            results |= self._score(row, tasks)
        return self._assemble(results)

    def _folder(self, label: str, task: LoadedTask) -> Path:
        return self.options.out / label / task.label

    def _identity(self, row: Candidate, task: LoadedTask) -> dict[str, Any]:
        """Identity of a model's score on a task, plain."""
        options = self.options
        return {
            **row.identity,
            "num_fewshot": task.shots,
            "task": task.digest,
            **{name: getattr(options, name) for name in IDENTITY},
            "device": torch.device(options.device).type,
            "versions": self.versions,
        }

    def _finished(self, row: Candidate, task: LoadedTask) -> dict[str, Any] | None:
        """Stored results; under ``overwrite`` they are removed.

        Raises:
            OutputError: the folder is another run's, or under ``overwrite`` none of ours.
        """
        folder = self._folder(row.label, task)
        if not self.options.overwrite:
            return finished(folder, self._identity(row, task), row.checkpoint.identity)
        if is_first() and folder.exists():
            if not (folder / RESULTS).is_file() and not (folder / ANSWERS).is_dir():
                raise OutputError(f"{folder} holds something else; --overwrite replaces results of this script alone")
            shutil.rmtree(folder)
        return None

    def _score(self, row: Candidate, tasks: list[LoadedTask]) -> dict[tuple[str, str], Any]:
        names = ("device", "dtype", "batch_size", "parallelize", "trust_remote_code")
        settings = {name: getattr(self.options, name) for name in names}
        model = NamexLM(str(self._model(row).resolve()), **settings)
        row.checkpoint.identity.settle()  # what was read just now is read again from memory
        results = {}
        for task in tasks:
            with self.bar(f"{row.label}, {task.label}") as model.progress:
                folder, identity = self._folder(row.label, task), self._identity(row, task)
                results[row.label, task.label] = score(
                    *(model, task, folder, identity, self.options.limit, self.options.seed),
                    chat=self.options.apply_chat_template,
                )
        return results

    def _model(self, row: Candidate) -> Path:
        """The model's folder; a recipe is applied first, by one process, and a killed run goes on."""
        if row.plan is None:
            return row.checkpoint.folder
        out = self.options.out / MODELS / row.label
        if is_first():
            with self.bar(f"{row.label}, patching") as progress:
                run_all([Run(row.plan, out, overwrite=self.options.overwrite)], progress)
        _wait_for_all()
        return out

    def _assemble(self, results: dict[tuple[str, str], Any]) -> ZeroShotReport:
        scores = [one for task in self.tasks for row in self.rows for one in self._scores(row, task, results)]
        models = [ScoredModel.of(row, self.options.dtype) for row in self.rows]
        options = {name: value for name, value in asdict(self.options).items() if name not in ("out", "overwrite")}
        return ZeroShotReport({**options, "versions": self.versions}, models, scores)

    def _scores(self, row: Candidate, task: LoadedTask, known: dict[tuple[str, str], Any]) -> Iterator[Score]:
        """Every metric of a model on a task, or on each task of a tag."""
        results = known[row.label, task.label]
        for name in [task.name] if task.name in results["results"] else sorted(task.tasks):
            values = results["results"][name]
            for metric, keep in metrics(values):
                own = items(self._folder(row.label, task), results, name, metric, keep)
                other = None
                if row.baseline is not None:
                    stored = known[row.baseline, task.label]
                    other = items(self._folder(row.baseline, task), stored, name, metric, keep)
                comparable = own and other and own.hashes == other.hashes and len(own.values) > 1
                stderr = values.get(f"{metric}_stderr,{keep}")
                if not isinstance(stderr, float):  # lm-eval gives none
                    stderr = own and error_of([own.values])
                yield Score(
                    *(row.label, name, metric, keep, values[f"{metric},{keep}"], stderr),
                    items=sum(results["n-samples"][one]["effective"] for one in members(results, name)),
                    num_fewshot=shots_of(results, name),
                    higher_is_better=results["higher_is_better"].get(name, {}).get(metric, True) is not False,
                    data=task.data,
                    file=f"{row.label}/{task.label}/{RESULTS}",
                    baseline=row.baseline,
                    difference=paired(own.values, other.values) if comparable and own and other else None,
                    paper=self.paper.score(row.checkpoint.config, row.recipe, name),
                )


def _wait_for_all() -> None:
    """Wait for the other processes of ``accelerate launch``."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The time that one process patches for must not count as a hang.
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))]).wait_for_everyone()
