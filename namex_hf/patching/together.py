"""Several results from one reading of the text: their runs go in step, layer by layer."""

import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import replace

from ..progress import ProgressCallback, ProgressEvent, no_progress
from ..record import Report
from .pipeline import Passage
from .plan import Plan
from .run import Run
from .scores import DEPENDS_ON


def share_reading(runs: Sequence[Run]) -> bool:
    """Whether one reading of the text does for all: it is the same text, and layers see it as the original's do."""
    plans = [run.plan for run in runs if run.scores is None and run.moments is None]  # which stand for the text
    texts = [(plan.tokens, *map(plan.run.get, DEPENDS_ON)) for plan in plans]
    reads = len(plans) == len(runs) and all(plan.reads_text and plan.recipe.reads_original for plan in plans)
    return reads and all(text == texts[0] for text in texts)


def run_all(runs: Sequence[Run], progress: ProgressCallback = no_progress) -> list[Report]:
    """One run, or several that `share_reading`: all results of a layer are made before the text goes on.

    Memory: as of one. The states of all are on the disk at once.

    Raises:
        As `patch_checkpoint`. What ends one run ends all.
    """
    for run in runs:
        run.check()
    progress, shared, room = _counting([run.plan for run in runs], progress), Passage(), [run.room() for run in runs]
    return _in_step([run.go(progress, shared, sum(room) - own) for run, own in zip(runs, room, strict=True)])


def _in_step(runs: Sequence[Generator[int, None, Report]]) -> list[Report]:
    """Let the run go on that is at the lowest layer, until all have ended. What ends one early ends all."""
    reports: dict[int, Report] = {}
    layers = dict.fromkeys(range(len(runs)), -1)
    try:
        while layers:
            number = min(layers, key=layers.__getitem__)
            try:
                layers[number] = next(runs[number])
            except StopIteration as end:
                reports[number] = end.value
                del layers[number]
    except BaseException as error:
        for other in layers.keys() - {number}:
            with suppress(type(error)):
                runs[other].throw(error)
        raise
    return [reports[number] for number in range(len(runs))]


def _counting(plans: Sequence[Plan], progress: ProgressCallback) -> ProgressCallback:
    """A callback, for several threads, that adds how many bytes of all runs are done."""
    # Looked at or merged once; where shards are carried over as they are, copied as well.
    total = sum(plan.checkpoint.size * (1 if plan.recipe.merge.rewrites else 2) for plan in plans)
    done, lock = 0, threading.Lock()

    def count(event: ProgressEvent) -> None:
        nonlocal done
        with lock:
            done += event.amount
            progress(replace(event, done=min(done, total), total=total))

    return count
