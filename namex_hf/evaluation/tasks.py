"""lm-eval's tasks, those of this package, and text: found, with their data, before any model is loaded."""

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from ..checkpoint.hub import UNREACHABLE
from ..errors import TaskError
from .text_task import text_task

SHORT = {"arc": ("arc_challenge", "arc_easy")}
"""Names for several tasks that lm-eval has no group for."""


@dataclass(frozen=True)
class LoadedTask:
    """A task, group or tag as it was asked for, with everything that it takes to run it."""

    name: str
    loaded: dict[str, Any]
    """As `lm_eval.tasks.TaskManager.load` gives it."""
    digest: str
    """SHA-256 of prompts' makings and documents: other data under the same name is another task."""
    shots: int = 0
    """Worked examples in the prompt, but for tasks that take none."""
    stated: bool = False
    """Whether the number was asked for with the name, as in ``gsm8k:5``."""

    @property
    def label(self) -> str:
        """Of its folder; tells it from the same task with another number of examples."""
        return f"{self.name}-{self.shots}shot" if self.stated else self.name

    @property
    def tasks(self) -> dict[str, Any]:
        return self.loaded["tasks"]

    @property
    def data(self) -> dict[str, Any]:
        """Where the documents come from, as the first of the tasks says it."""
        config = next(iter(self.tasks.values())).config
        return {
            "dataset": config.dataset_path or self.name,
            "config": config.dataset_name,
            "split": config.test_split or config.validation_split,
        }


def load_tasks(
    names: Sequence[str],
    texts: Sequence[Path] = (),
    *,
    include: Path | None = None,
    data: Path | None = None,
    num_fewshot: int = 0,
    seed: int = 1234,
) -> list[LoadedTask]:
    """Load tasks with their data.

    Args:
        names: tasks, groups or tags of lm-eval, those of `SHORT`, or of YAML files below `include`, which come first;
            each alone, or with its number of worked examples, as in ``gsm8k:5``.
        texts: files whose perplexity is measured.
        data: a folder that holds copies of data sets under their Hub names (``openai/gsm8k/...``).
        num_fewshot: worked examples before each question, where a name states none.
        seed: of their choice.

    Raises:
        TaskError: a name that nobody knows, data that cannot be had, too few examples in them, a file that is no text.
    """
    if data is not None and not data.is_dir():
        raise TaskError(f"--data {data} is no folder; needed: one that holds data sets, such as {data}/openai/gsm8k")
    requests = dict.fromkeys(_with_shots(name, num_fewshot) for name in in_full(names))
    own = _known_tasks(include, official=False)
    manager = own
    if any(one.name not in own.all_tasks for one in requests):
        manager = _known_tasks(include, official=True)
    for one in requests:
        if one.name not in manager.all_tasks:
            near = difflib.get_close_matches(one.name, manager.all_tasks, 3)
            raise TaskError(f"task {one.name} is not known{'; near it: ' + ', '.join(near) if near else ''}")
    found = [(one, _load(manager, one.name, data, packaged=one.name in own.all_tasks)) for one in requests]
    for path in texts:
        spec = text_task(path)
        found.append((TaskRequest(spec["task"], num_fewshot), manager.load([spec])))
    return [_with_digest(one, loaded, seed) for one, loaded in found]


def in_full(names: Sequence[str]) -> list[str]:
    """`names` with the tasks of each name of `SHORT` in its place; a number of examples goes to each."""
    parts = [name.partition(":") for name in names]
    return [one + colon + shots for name, colon, shots in parts for one in SHORT.get(name, (name,))]


@dataclass(frozen=True)
class TaskRequest:
    """A task's name, and how many worked examples there are to be."""

    name: str
    shots: int
    stated: bool = field(default=False, compare=False)


def _with_shots(text: str, default: int) -> TaskRequest:
    """``TASK`` or ``TASK:N``.

    Raises:
        TaskError: what follows the colon is no number.
    """
    name, colon, number = text.partition(":")
    if not colon:
        return TaskRequest(name, default)
    if not number.isdecimal() or len(number) > 9:
        raise TaskError(f"task {text}: {number!r}; accepted: TASK, or TASK:N with N worked examples, such as {name}:5")
    return TaskRequest(name, int(number), stated=True)


@functools.cache
def _known_tasks(include: Path | None, official: bool) -> TaskManager:
    """The names that are known; lm-eval's own take seconds to look through."""
    return TaskManager(include_path=str(include) if include else None, include_defaults=official)


def _with_digest(request: TaskRequest, loaded: Mapping[str, Any], seed: int) -> LoadedTask:
    digest = hashlib.sha256()
    taking = [name for name, task in sorted(loaded["tasks"].items()) if _set_examples(name, task, request.shots)]
    if request.stated and request.shots and not taking:
        raise TaskError(f"task {request.name}:{request.shots} takes no examples; accepted: {request.name}")
    for task_name, task in sorted(loaded["tasks"].items()):
        task.set_fewshot_seed(seed=seed)
        digest.update(json.dumps([task_name, _plain(task.dump_config())], sort_keys=True).encode())
        for document in task.eval_docs:
            digest.update(json.dumps(document, default=handle_non_serializable, sort_keys=True).encode())
    return LoadedTask(request.name, dict(loaded), digest.hexdigest(), request.shots if taking else 0, request.stated)


def _set_examples(name: str, task: Any, shots: int) -> bool:
    """Have a task put worked examples before each question; whether it takes any.

    Raises:
        TaskError: it runs code, asks for what a causal model does not give, or has fewer examples.
    """
    if getattr(task, "UNSAFE_CODE", False):
        raise TaskError(f"task {name} runs code that the model writes (unsafe_code); no such task is accepted")
    kind = task.get_config("output_type")
    if kind not in ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"):
        raise TaskError(f"task {name} asks for {kind}; a causal model gives no such thing")
    # Text is scored as it stands; some tasks forbid examples by stating 0 themselves.
    if task.get_config("num_fewshot") == 0 or task.OUTPUT_TYPE == "loglikelihood_rolling":
        return False
    task.set_config(key="num_fewshot", value=shots)
    if shots and (there := sum(1 for _ in task.fewshot_docs())) < shots:
        raise TaskError(f"task {name}: {shots} worked examples are asked for; its data have {there}")
    return True


def _plain(config: Any) -> Any:
    """A task's configuration as JSON; functions by their source, which lm-eval puts there itself."""
    return json.loads(json.dumps(config, default=lambda value: getattr(value, "__name__", type(value).__name__)))


def _load(manager: TaskManager, name: str, data: Path | None, packaged: bool) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if data is not None:
            # The official files name their data sets as on the Hub; a folder of that name, from here, comes first.
            stack.enter_context(contextlib.chdir(data))
            stack.enter_context(_without_cache())
        if not packaged and not _hub_reachable():
            stack.enter_context(_offline())
        try:
            return manager.load([name])
        except Exception as error:  # whatever a data set's reader raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            where = f"{data}/" if data is not None else "DIR/"
            raise TaskError(
                f"task {name}: its data cannot be had ({reason}); accepted: a Hub that can be reached, its local "
                f"cache, or --data DIR with a copy under the data set's Hub name, such as {where}openai/gsm8k "
                "(python eval/make_local_gsm8k.py makes that one)"
            ) from error


def _hub_reachable() -> bool:
    """Ask once: the clients would each try for half a minute before they look into their cache."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        get_hf_file_metadata(hf_hub_url("openai/gsm8k", "README.md", repo_type="dataset"))
    except HfHubHTTPError:  # an answer
        return True
    except UNREACHABLE:
        return False
    return True


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Read data sets into memory: the library's cache would answer for any local folder of the same relative path."""
    before = datasets.config.HF_DATASETS_CACHE, datasets.config.IN_MEMORY_MAX_SIZE
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE, datasets.config.IN_MEMORY_MAX_SIZE = Path(cache), sys.maxsize
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE, datasets.config.IN_MEMORY_MAX_SIZE = before


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does, for a while: both libraries read the variable when they are imported."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    level = logging.getLogger("datasets").level
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        logging.getLogger("datasets").setLevel(level)
