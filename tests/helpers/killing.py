"""Real processes that patch, and are killed while they do."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from namex_hf import Recipe, load_patched, patch_checkpoint
from namex_hf.checkpoint.folder import OutputFolder
from namex_hf.errors import CheckpointError
from namex_hf.progress import ProgressEvent
from tests.helpers.process import SERVER


def start(source: Path, out: Path, recipe: Recipe, **options: Any) -> BaseProcess:
    """Begin a run in a process of its own."""
    process = SERVER.Process(target=patch_checkpoint, args=(source, out, recipe), kwargs=options)
    process.start()
    return process


@dataclass
class Killing:
    """Progress that kills its own process as soon as it is told of something, for the ``times``-th time."""

    what: str
    times: int = 1

    def __call__(self, event: ProgressEvent) -> None:
        self.times -= str(event) == self.what
        if not self.times:
            os.kill(os.getpid(), signal.SIGKILL)


def run(source: Path, out: Path, recipe: Recipe, **options: Any) -> None:
    """A whole run in a process of its own."""
    process = start(source, out, recipe, **options)
    process.join()
    assert process.exitcode == 0, f"the run on {out.name} ended with {process.exitcode}"


def hold_folder(out: Path, claimed: Any, release: Any) -> None:
    """Claim a folder and keep it until told or killed: for a process of its own, with two of its events."""
    with OutputFolder(out, {"recipe": 1}).claimed(overwrite=False):
        claimed.set()
        release.wait()


def await_claim(out: Path, running: Callable[[], bool]) -> None:
    """Wait until a run has claimed its folder: imports and checks are over, the patching begins."""
    while running() and not (out / ".namex" / "run.json").exists():
        time.sleep(0.002)


def duration(source: Path, out: Path, recipe: Recipe, **options: Any) -> float:
    """Seconds of an undisturbed run, from its claim to its end."""
    process = start(source, out, recipe, **options)
    await_claim(out, process.is_alive)
    begin = time.perf_counter()
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - begin


def settled(out: Path) -> int:
    """How many files of a run, its own state included, are whole."""
    return sum(path.is_file() and path.suffix != ".part" for path in out.rglob("*"))


def kill_at(process: BaseProcess, out: Path, delay: float) -> bool:
    """SIGKILL so many seconds after the claim; whether that was in the middle of the run."""
    await_claim(out, process.is_alive)
    time.sleep(delay)
    return _kill(process, out)


def kill_after(process: BaseProcess, out: Path, files: int, lot: random.Random) -> bool:
    """SIGKILL shortly after so many files are whole; whether that was in the middle of the run."""
    while process.is_alive() and (not out.exists() or settled(out) < files):
        time.sleep(0.002)
    time.sleep(lot.uniform(0, 0.004))
    return _kill(process, out)


def _kill(process: BaseProcess, out: Path) -> bool:
    process.kill()
    process.join()
    assert process.exitcode in (0, -9), f"the run on {out.name} ended by itself, with {process.exitcode}"
    return process.exitcode == -9 and out.exists() and not (out / "config.json").exists()


TRIES = 5
"""On a busy machine a signal may come when a run is over: so often it is begun again."""


def is_no_model(out: Path) -> None:
    """Neither transformers nor this package opens the folder."""
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(CheckpointError):
        load_patched(out)


def is_clean(out: Path) -> None:
    assert not (out / ".namex").exists()
    assert not list(out.rglob("*.part"))
