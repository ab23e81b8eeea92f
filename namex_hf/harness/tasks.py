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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from ..checkpoint.hub import UNREACHABLE
from .errors import TaskError
from .text import text_task


@dataclass(frozen=True)
class Chosen:
    """A task, group or tag as it was asked for, with everything that it takes to run it."""

    name: str
    loaded: dict[str, Any]
    """As `lm_eval.tasks.TaskManager.load` gives it."""
    digest: str
    """SHA-256 of prompts' makings and documents: other data under the same name is another task."""

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


def chosen(
    names: Sequence[str],
    texts: Sequence[Path] = (),
    *,
    include: Path | None = None,
    data: Path | None = None,
    num_fewshot: int = 0,
    seed: int = 1234,
) -> list[Chosen]:
    """Load tasks with their data.

    Args:
        names: tasks, groups or tags of lm-eval, or of YAML files below `include`, which come first.
        texts: files whose perplexity is measured.
        data: a folder that holds copies of data sets under their Hub names (``openai/gsm8k/...``).
        num_fewshot: worked examples before each question.
        seed: of their choice.

    Raises:
        TaskError: a name that nobody knows, data that cannot be had, a file that is no text.
    """
    if data is not None and not data.is_dir():
        raise TaskError(f"--data {data} is no folder; needed: one that holds data sets, such as {data}/openai/gsm8k")
    own = _manager(include, official=False)
    manager = own
    if any(name not in own.all_tasks for name in names):
        manager = _manager(include, official=True)
    found = []
    for name in dict.fromkeys(names):
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise TaskError(f"task {name} is not known{'; near it: ' + ', '.join(near) if near else ''}")
        found.append((name, _loaded(manager, name, data, packaged=name in own.all_tasks)))
    for path in texts:
        spec = text_task(path)
        found.append((spec["task"], manager.load([spec])))
    return [_prepared(name, loaded, num_fewshot, seed) for name, loaded in found]


@functools.cache
def _manager(include: Path | None, official: bool) -> TaskManager:
    """The names that are known; lm-eval's own take seconds to look through."""
    return TaskManager(include_path=str(include) if include else None, include_defaults=official)


def _prepared(name: str, loaded: Mapping[str, Any], num_fewshot: int, seed: int) -> Chosen:
    digest = hashlib.sha256()
    for task_name, task in sorted(loaded["tasks"].items()):
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(f"task {task_name} runs code that the model writes (unsafe_code); no such task is accepted")
        if task.get_config("output_type") not in (
            "multiple_choice",
            "loglikelihood",
            "loglikelihood_rolling",
            "generate_until",
        ):
            raise TaskError(
                f"task {task_name} asks for {task.get_config('output_type')}; a causal model gives no such thing"
            )
        # Text is scored as it stands; some tasks forbid examples by stating 0 themselves.
        if task.get_config("num_fewshot") != 0 and task.OUTPUT_TYPE != "loglikelihood_rolling":
            task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=seed)
        digest.update(json.dumps([task_name, _plain(task.dump_config())], sort_keys=True).encode())
        for document in task.eval_docs:
            digest.update(json.dumps(document, default=handle_non_serializable, sort_keys=True).encode())
    return Chosen(name, dict(loaded), digest.hexdigest())


def _plain(config: Any) -> Any:
    """A task's configuration as JSON; functions by their source, which lm-eval puts there itself."""
    return json.loads(json.dumps(config, default=lambda value: getattr(value, "__name__", type(value).__name__)))


def _loaded(manager: TaskManager, name: str, data: Path | None, packaged: bool) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if data is not None:
            # The official files name their data sets as on the Hub; a folder of that name, from here, comes first.
            stack.enter_context(contextlib.chdir(data))
            stack.enter_context(_read_anew())
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
def _read_anew() -> Iterator[None]:
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
