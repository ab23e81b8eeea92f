"""What ``namex compare`` shows: progress and tables."""

import statistics
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from ..evaluation.compare import BEGINS, ENDED, FAILED, KNOWN, Comparison
from ..evaluation.compare_table import notes, tables
from ..printable import marked, printable
from ..progress import ProgressEvent


class Shown:
    """Progress: a bar for all, a line for each model under way; elsewhere than on a terminal a line a finished one."""

    def __init__(self, models: int, jobs: int, console: Console) -> None:
        self.models, self.jobs, self.console = models, jobs, console
        hidden = console.quiet or not console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.progress = Progress(*columns, console=console, disable=hidden, transient=True)
        self.all = self.progress.add_task("models", total=models, left="")
        self.under_way: dict[str, tuple[TaskID, float]] = {}
        self.seconds: list[float] = []
        self.done = 0

    def show(self, event: ProgressEvent) -> None:
        """A model was known, began, went on, or ended."""
        if event.stage == KNOWN:
            self.done += 1
        elif event.stage == BEGINS:
            bar = self.progress.add_task(marked(event.model), total=None, left="")
            self.under_way[event.model] = bar, time.perf_counter()
        elif event.stage in (ENDED, FAILED):
            self._ended(event)
        else:
            bar, _ = self.under_way[event.model]
            what = f"{marked(event.model)}: {marked(str(event))}"
            self.progress.update(bar, description=what, completed=event.done, total=event.total)
        self.progress.update(self.all, completed=self.done, left=self._left())

    def _ended(self, event: ProgressEvent) -> None:
        bar, start = self.under_way.pop(event.model)
        self.progress.remove_task(bar)
        self.seconds.append(time.perf_counter() - start)
        self.done += 1
        how = FAILED if event.stage == FAILED else f"{self.seconds[-1]:.0f} s"
        line = f"{self.done}/{self.models} {event.model}: {how}, {self._left()}".rstrip(", ")
        self.console.print(printable(line), soft_wrap=True, markup=False, highlight=False)

    def _left(self) -> str:
        """Time left, by what models took so far."""
        to_come = self.models - self.done
        if not self.seconds or not to_come:
            return ""
        seconds = statistics.fmean(self.seconds) * to_come / self.jobs
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


def print_tables(comparison: Comparison) -> None:
    console = Console()
    for title, table in tables(comparison):
        console.print(f"{title}:", highlight=False)
        for part in table.parts(console.width):
            console.print(part.screen(compact=True))
    for note in notes(comparison):
        console.print(f"* {printable(note)}", markup=False, highlight=False)
