"""Processes of the tests, forked from one server that has imported what takes seconds, and scripts run in them."""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HELPERS = Path(__file__).parent
"""Scripts for processes of their own lie here too."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["namex_hf.training.tune", "namex_hf.evaluation.zero_shot"])
"""There is one server a process, and the last list counts: no other file sets one."""


def be_script(
    script: Path | str,
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    changes: Sequence[Callable[[], None]] = (),
) -> None:
    """Be a script, or a module by its name, with its output in a file. Changes are made before it begins."""
    gc.freeze()  # what the server has imported is not searched for garbage again
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        for change in changes:
            change()
        sys.argv = [str(script), *arguments]
        if isinstance(script, Path):
            runpy.run_path(str(script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)


def script_process(script: Path | str, arguments: Sequence[str], log: Path, **options: Any) -> BaseProcess:
    """A script that has begun in a process of its own. Args as of `be_script`."""
    process = SERVER.Process(target=partial(be_script, script, arguments, log, **{"environment": {}, **options}))
    process.start()
    return process


def places(processes: int) -> list[dict[str, str]]:
    """What a launcher of data-parallel processes tells each of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(processes)]


def run_pair(script: Path, arguments: Sequence[object], folder: Path, **environment: str) -> None:
    """A script in two data-parallel processes, to its end.

    Args:
        folder: for their output, ``0.log`` and ``1.log``.
    """
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = [
        script_process(script, [*map(str, arguments)], log, environment=environment | place)
        for log, place in zip(logs, places(2), strict=True)
    ]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
