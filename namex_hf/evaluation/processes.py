"""Cells in processes of their own: one that fails or is killed takes no other with it, and none outlives its parent."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ..errors import NamexError
from ..progress import ProgressCallback
from .measure import CellTask, measure

CONTEXT = multiprocessing.get_context("forkserver")
"""Children are forked from a process that has imported this package and done nothing else: their times and their peak
memory are their own, and imports are paid for once."""


@dataclass(frozen=True)
class Outcome:
    """The end of a task: a result, or the reason why there is none."""

    task: CellTask
    result: dict[str, Any] | None = None
    error: str | None = None
    fault: bool = False
    """Whether the reason is none that a user can mend: the task's log has the traceback."""


def outcomes(
    tasks: Sequence[CellTask], at_once: int, begin: Callable[[CellTask], None], progress: ProgressCallback
) -> Generator[Outcome]:
    """Run tasks, so many at once, and give each outcome as it comes. Processes still running are killed at the end.

    Args:
        begin: called before a task's process starts.
        progress: called in this process; events name the task's model.
    """
    CONTEXT.set_forkserver_preload([measure.__module__])
    waiting, running = deque(tasks), dict[Connection, tuple[CellTask, BaseProcess]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                task = waiting.popleft()
                begin(task)
                pipe, process = _start(task)
                running[pipe] = (task, process)
            for pipe in [pipe for pipe in wait(list(running)) if isinstance(pipe, Connection)]:
                task, process = running[pipe]
                outcome = _listen(task, process, pipe, progress)
                if outcome is not None:
                    del running[pipe]
                    yield outcome
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _start(task: CellTask) -> tuple[Connection, BaseProcess]:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_child, args=(task, theirs))
    process.start()
    theirs.close()  # so that the end of the child is the end of the pipe
    return ours, process


def _listen(task: CellTask, process: BaseProcess, pipe: Connection, progress: ProgressCallback) -> Outcome | None:
    """Take one message; an outcome where it was the last."""
    try:
        kind, content = pipe.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with status {code}"
        return Outcome(task, error=f"its process {how}")
    if kind == "progress":
        progress(replace(content, model=task.label))
        return None
    process.join()
    pipe.close()
    if kind == "result":
        return Outcome(task, result=content)
    return Outcome(task, error=content, fault=kind == "fault")


def _child(task: CellTask, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with task.log.open("w", encoding="utf-8") as log:
        for stream in (1, 2):  # what libraries print would tear the parent's progress
            os.dup2(log.fileno(), stream)
        try:
            pipe.send(("result", measure(task, lambda event: pipe.send(("progress", event)))))
        except (NamexError, OSError) as error:
            pipe.send(("error", str(error)))
        except Exception as error:  # a fault of this package or of a library: the other cells go on
            traceback.print_exc(file=log)
            message = " ".join(f"{type(error).__name__}: {error}".split())
            pipe.send(("fault", f"{message} (traceback in {task.log})"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
