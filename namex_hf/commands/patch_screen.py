"""What ``namex-patch`` shows: progress, forecast, scores and tables."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from ..checkpoint.source import Checkpoint, open_checkpoint
from ..checkpoint.tokenizer_code import lack_of_tokenizer
from ..defaults import SCORED_TOKENS, SMALL_BYTES
from ..errors import CheckpointError, NamexError
from ..evaluation.perplexity import before_and_after
from ..evaluation.routing import routing_on_held_out
from ..evaluation.table import facts
from ..evaluation.verdict import answers_before_and_after, verdict
from ..files import size_text
from ..patching.effort import Effort, effort_of
from ..patching.estimate import peak_bytes
from ..patching.patch import rewrite_report
from ..patching.plan import Plan
from ..patching.run import Run
from ..patching.text_pass import streams_memory
from ..patching.together import run_all
from ..printable import marked
from ..progress import FINISHED, ProgressEvent
from ..record import Report, choices
from ..report.layers import layer_table, perplexity_table
from ..report.write import write_pictures
from .common import of_memory
from .patch_warnings import text_lines
from .width_table import width_table

SCORED_BYTES = SMALL_BYTES  # a checkpoint up to this size has its perplexity measured
DRAWN_BYTES = SCORED_BYTES  # a checkpoint up to this size has its pictures drawn at the end of the run
FORECAST_SECONDS = 60  # of work to come, from which on it is announced
LINE_SECONDS = 10  # between two lines of layers, at least: short runs print none


def run_with_progress(runs: Sequence[Run], quiet: bool, console: Console) -> Sequence[Report]:
    """As `run_all`, with a bar on a terminal, elsewhere with a line a layer where layers take their time."""
    plan, layers = runs[0].plan, sum(len(run.plan.shape.layers) for run in runs)
    tokens = plan.text.tokens if plan.text else 0
    columns = (TextColumn("{task.description:>16}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), ToGo())
    efforts = [(effort, run.plan) for run in runs if (effort := effort_of(run.plan))]
    seconds = sum(effort.seconds(one) * len(one.shape.layers) for effort, one in efforts if not effort.steps)
    for effort, one in efforts:
        if effort.steps or seconds >= FORECAST_SECONDS:
            console.print(_effort_line(effort, one), soft_wrap=True)
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("patching", total=None, end=None)
        pace, warnings = Pace(layers, tokens), list(text_lines(plan))

        def show(event: ProgressEvent) -> None:
            pace.follow(event)
            if line := pace.continuing(event):
                console.print(line, soft_wrap=True)
            end = None if pace.left is None else time.perf_counter() + pace.left
            bar.update(task, description=str(event), completed=event.done, total=event.total, end=end)
            if line := pace.line(event, each=hidden):
                console.print(line, soft_wrap=True)
            while pace.announced and warnings:
                console.print(warnings.pop(0), soft_wrap=True, markup=False)

        try:
            reports = run_all(runs, show)
        except Exception as error:
            if reason := of_memory(error):
                needed = f"this run needs about {size_text(peak_bytes(plan))} beside the libraries"
                raise CheckpointError(f"{reason}; {needed}") from error
            raise
    for line in warnings:
        console.print(line, soft_wrap=True, markup=False)
    return reports


class ToGo(ProgressColumn):
    """The time to go, which falls between two events too."""

    def render(self, task: Task) -> Text:
        end = task.fields["end"]
        return Text("" if end is None else f"{_time(max(0, end - time.perf_counter()))} to go")


class Pace:
    """How long a run has still to go, by the work that this process has done.

    Where text is read, nearly all time goes into layers: these count, and the steps of a layer's fit. Elsewhere bytes.

    Args:
        tokens: of the text; 0 where none is read.
    """

    def __init__(self, layers: int, tokens: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.layers = self.to_come = layers
        self.tokens, self.clock = tokens, clock
        self.bytes = self.finished = 0  # of this process
        self.worked = self.seconds = 0.0  # seconds of all layers that this process finished, and of the last one
        self.begin = self.layer_begin = self.stage_begin = self.printed = clock()
        self.left: float | None = None
        self.announced = self.continued = False

    def follow(self, event: ProgressEvent) -> None:
        """Take an event in: `left` is what it says of the seconds to go."""
        now = self.clock()
        inside = now - self.layer_begin
        if not event.resumed:
            self.bytes += event.amount
        if event.stage == FINISHED:
            self.to_come -= 1
            if not event.resumed:
                self.finished, self.worked, self.seconds = self.finished + 1, self.worked + inside, inside
        if event.stage in (FINISHED, "checking", "measured"):
            self.layer_begin, inside = now, 0.0
        if not event.steps:
            self.stage_begin = now
        if not self.tokens:
            self.left = ((event.total or 0) - event.done) * (now - self.begin) / self.bytes if self.bytes else None
        elif event.steps:  # the layer under way sets the pace: its time so far, and the rest of its fit
            rest = (now - self.stage_begin) * (event.steps - event.step) / event.step
            self.left = (inside + rest) * self.to_come - inside
        elif self.finished:
            self.left = max(0.0, self.worked / self.finished * self.to_come - inside)

    def continuing(self, event: ProgressEvent) -> str | None:
        """Once, before this process works on a layer: how many layers earlier ones finished."""
        done = self.layers - self.to_come - self.finished
        if event.resumed or not done or self.continued:
            return None
        self.continued = True
        return f"continuing: {done} of {self.layers} layers done"

    def line(self, event: ProgressEvent, each: bool) -> str | None:
        """After a layer: the forecast, once, if much is to come; else, where each layer has its line, this."""
        if event.stage != FINISHED or event.resumed:
            return None
        if self.tokens and not self.announced and (self.left or 0) >= FORECAST_SECONDS:
            self.announced = True
            return (
                f"{event}: {self.seconds:.1f} s, {1000 * self.seconds / self.tokens:.2f} ms a token; about "
                f"{(self.left or 0) / 60:.0f} min for the {self.to_come} layers to come"
            )
        if not each or self.layer_begin - self.printed < LINE_SECONDS:
            return None
        self.printed = self.layer_begin
        to_go = f", {_time(self.left)} to go" if self.left else ""
        return f"{event}: {self.seconds:.1f} s, {self.layers - self.to_come} of {self.layers} layers{to_go}"


def score(checkpoint: Checkpoint, out: Path, report: Report, console: Console) -> Report:
    """Perplexity before and after, and how routing changed, where the model is small enough to run here."""
    if lack := lack_of_tokenizer(checkpoint.folder):
        console.print(f"{lack} in the checkpoint: perplexity is skipped", soft_wrap=True)
        return report
    if checkpoint.size > SCORED_BYTES:
        line = (
            f"not scored, as {size_text(checkpoint.size)} would take long; this does: namex-compare "
            f"{marked(checkpoint.name)} --out DIR, with the same recipe"
        )
        console.print(line, soft_wrap=True)
        return report
    try:
        with console.status("perplexity before and after"):
            report = report.with_perplexity(before_and_after(checkpoint.folder, out, SCORED_TOKENS))
        if report.run["recipe"]["merge"] in ("grouped", "narrow"):
            with console.status("word problems before and after"):
                report = replace(report, answers=answers_before_and_after(checkpoint.folder, out))
        if report.run["recipe"]["routing"] != "linear" and not all("routing" in one for one in report.layers):
            report = report.with_routing(routing_on_held_out(out, SCORED_TOKENS))
    except Exception as error:  # whatever a foreign tokenizer raises: the patched folder itself is whole
        console.print(f"perplexity cannot be measured and is skipped: {marked(f'{type(error).__name__}: {error}')}")
        return report
    rewrite_report(out, report)
    return report


def draw(out: Path, size: int, report: Report, console: Console) -> None:
    """The pictures of a folder that is whole already, and their links in its card; without them it stays as it is.

    Args:
        size: bytes of the original; the pictures of a large one are a step of their own, ``namex-report``.
        report: the folder's, perplexity included.
    """
    later = f"namex-report {marked(out)}"
    if size > DRAWN_BYTES:
        console.print(f"pictures: {later}", soft_wrap=True)
        return
    try:
        page = write_pictures(out, console=console)
        rewrite_report(out, report)  # the card links the pictures that are there
    except Exception as error:  # whatever comes of drawing: the patched folder itself is whole
        reason = str(error) if isinstance(error, NamexError) else f"{type(error).__name__}: {error}"
        console.print(f"no pictures: {marked(reason)}; once that is mended: {later}", soft_wrap=True)
        return
    console.print(f"page: [bold]{marked(page)}[/bold]", soft_wrap=True)


def _effort_line(effort: Effort, plan: Plan) -> str:
    """What fitting or narrowing the layers will take at least."""
    what = f"fitted, each in {effort.steps} steps and" if effort.steps else "narrowed, each in"
    return (
        f"{len(plan.shape.layers)} layers {what} {effort.operations / 1e12:.3g} T operations: at least "
        f"{_time(effort.seconds(plan))} a layer at the speed that such products have here; "
        f"about {size_text(peak_bytes(plan))} of memory"
    )


def _text(requested: int, plan: Plan) -> str:
    if plan.text is None:
        return f"{requested} tokens of {plan.recipe.calibration.data}, not read yet"
    rest = requested - plan.text.tokens  # sequences are whole
    less = "" if rest < plan.text.ids.shape[1] else f"; it has no more, {requested} were asked for"
    return f"{plan.text.tokens} tokens of {plan.text.name}{less}"


def _memory(what: dict[str, Any], plan: Plan) -> str:
    """With the part that less text makes smaller."""
    hidden = streams_memory(plan.recipe, plan.shape) if plan.reads_text else 0
    more = f", {size_text(hidden)} of it the text on its way (--calibration-tokens)" if hidden else ""
    return size_text(what["peak_bytes"]) + more


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def print_dry_run(what: dict[str, Any], plan: Plan) -> None:
    recipe = plan.recipe
    table = {
        "recipe": choices(recipe.to_dict()),
        "MoE layers": what["layers"],
        "routed experts a layer": f"{what['experts']} -> {what['kept']}",
        "neurons a routed expert": f"{plan.shape.width} -> {what['width']}",
        "routed parameters that stay": f"{what['share']:.1%}",
        "device of the arithmetic": what["device"],
        "bytes in": size_text(what["bytes_in"]),
        "bytes out": size_text(what["bytes_out"]),
        "peak memory (estimate)": _memory(what, plan),
    }
    if what["width"] == plan.shape.width:
        del table["neurons a routed expert"]
    if not recipe.merge.rewrites:
        del table["routed parameters that stay"]
    if what["calibration_tokens"]:
        table["calibration text"] = _text(what["calibration_tokens"], plan)
    if effort := what["effort"]:
        table["time"] = _effort_line(effort, plan)
    if what["curvature_parameters"]:
        table["trainable curvature"] = _counts(what["curvature_parameters"])
    table["disk needed / free"] = f"{size_text(what['space_needed'])} / {size_text(what['free'])}"
    table["files carried over"] = ", ".join(what["carried"]) or "none"
    read = "headers and the text" if plan.text else "headers"
    Console().print(facts(table, f"dry run: nothing was read but {read}, nothing was written"))
    if recipe.merge.kind == "narrow":
        Console().print(
            width_table(plan).screen("widths near this one, and what takes them", ["GGUF types of down_proj"])
        )


def print_room(each: list[dict[str, Any]], together: bool) -> None:
    """What several results need on the disk: made together, their states too are there at once."""
    states = [one["space_needed"] - one["bytes_out"] for one in each]
    needed = sum(one["bytes_out"] for one in each) + (sum(states) if together else max(states))
    Console().print(f"all {len(each)}: disk needed / free: {size_text(needed)} / {size_text(each[0]['free'])}")


def print_report(report: Report, original: Checkpoint, out: Path) -> None:
    console, recipe = Console(), report.run["recipe"]
    if report.layers:
        console.print(
            *layer_table(report).screens(console.width, f"{report.source['name']}: {choices(recipe)}", ["status"])
        )
    if text := report.run.get("calibration"):
        seconds = sum(layer["seconds"] for layer in report.layers) / len(report.layers)
        console.print(
            f"calibrated on {text['tokens']} tokens of {marked(text['name'])}: {seconds:.2f} s a layer, "
            f"{1000 * seconds / text['tokens']:.3f} s for 1,000 tokens",
            soft_wrap=True,
        )
    if report.perplexity:
        title = f"perplexity, the first {SCORED_TOKENS} tokens of each held-out text"
        console.print(perplexity_table(report).screen(title))
    for sentence in verdict(report, original, open_checkpoint(out)):
        console.print(marked(sentence), soft_wrap=True)
    totals = report.totals
    if "curvature_parameters" in totals:
        console.print(f"trainable curvature, the identity so far: {_counts(totals['curvature_parameters'])}")
    if "spectral_radius" in totals:
        radius, over = totals["spectral_radius"], totals["spectral_radius_over_layers"]
        warning = "" if radius < 1 else " [bold red]warning: 1 or more, the walk of the base does not settle[/bold red]"
        console.print(f"spectral radius of the walk: {radius:.3f} a layer, {over:.3g} over its layers{warning}")
    console.print(
        f"patched in {totals['seconds']:.1f} s"
        + (f", peak memory {size_text(peak)}" if (peak := totals["peak_resident_bytes"]) else "")
        + f": [bold]{marked(out)}[/bold]",
        soft_wrap=True,
    )


def _counts(parameters: dict[str, int]) -> str:
    return ", ".join(f"{number:,} parameters {of}" for of, number in parameters.items())
