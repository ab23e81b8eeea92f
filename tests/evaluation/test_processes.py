"""A child that says nothing for long must not outlive its parent."""

import multiprocessing
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from namex_hf.checkpoint.folder import OutputFolder
from namex_hf.errors import OutputError
from namex_hf.evaluation.processes import _end_with_parent
from tests.helpers.killing import hold_folder
from tests.helpers.process import SERVER

PATIENCE = 60  # seconds until a child that stays is called one


def child(out: Path, claimed: Any, release: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    hold_folder(out, claimed, release)


def parent(out: Path, claimed: Any, release: Any) -> None:
    multiprocessing.get_context("fork").Process(target=child, args=(out, claimed, release)).start()
    signal.pause()


def test_a_child_ends_with_its_parent(tmp_path: Path):
    claimed, release = SERVER.Event(), SERVER.Event()
    process = SERVER.Process(target=parent, args=(tmp_path / "out", claimed, release))
    process.start()
    claimed.wait()
    assert not free(tmp_path / "out")
    process.kill()
    process.join()
    end = time.monotonic() + PATIENCE
    while not free(tmp_path / "out"):
        if time.monotonic() > end:
            release.set()
            pytest.fail("the child is still there")
        time.sleep(0.005)


def free(out: Path) -> bool:
    """Whether nobody holds the folder."""
    try:
        with OutputFolder(out, {"recipe": 1}).claimed(overwrite=False):
            return True
    except OutputError:
        return False
