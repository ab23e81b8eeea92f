"""The commands: parse, call, print."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from .checkpoint.companions import has_tokenizer
from .checkpoint.folder import OutputFolder
from .checkpoint.layout import left_out_line
from .checkpoint.resolve import packaged_models, peek, resolve
from .checkpoint.source import Checkpoint
from .errors import CheckpointError, NamexError, RecipeError
from .hub.client import check_repo
from .hub.errors import PublishError
from .hub.push import Target, check_access
from .patching.effort import Effort, effort_of, measured_speed
from .patching.inspect import inspection
from .patching.patch import describe, rewrite_report, run_plan
from .patching.plan import Plan, make_plan
from .printable import marked
from .program import Parser, ended, of_memory
from .recipe import RULES, Recipe, read_yaml
from .report.report import Report, layer_table, ratio

SCORED_BYTES = 256 << 20  # a checkpoint up to this size has its perplexity measured
SCORED_TOKENS = 8192  # of each domain
DRAWN_BYTES = SCORED_BYTES  # a checkpoint up to this size has its pictures drawn at the end of the run
FLAGS = {"false": False, "true": True}
FORECAST_SECONDS = 60  # of work to come, from which on it is announced


def patch(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``namex-patch``."""
    parser = _patch_parser()
    return _run(parser, arguments, _patch)


def inspect(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``namex-inspect``."""
    parser = Parser(prog="namex-inspect", description="Say what a checkpoint is, without reading its tensors.")
    parser.add_argument("model", metavar="DIR_OR_ID", help=_MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    return _run(parser, arguments, _inspect)


_MODEL_HELP = f"a local folder, a packaged model ({', '.join(packaged_models())}), or a Hub id USER/NAME"


def _run(parser: Parser, arguments: Sequence[str] | None, command: Callable[[argparse.Namespace], int]) -> int:
    options = parser.parse_args(arguments)
    return ended(parser.prog, lambda: command(options))


def _patch_parser() -> Parser:
    parser = Parser(
        prog="namex-patch",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Merge the experts of a Mixture-of-Experts checkpoint with NAMEx (Nash bargaining between them).\n"
        "One or two layers are in memory at a time. A run that was killed is continued by the same command.",
        epilog="examples:\n"
        "  namex-patch tiny --out out/tiny\n"
        "  namex-patch Qwen/Qwen1.5-MoE-A2.7B --out out/qwen --recipe patches/qwen1.5-moe-a2.7b/namex-full.yaml\n"
        "  namex-patch tiny-deepseek --out out/half --merge grouped --experts 8 --export-as qwen2_moe\n\n"
        "what is refused:\n" + "\n".join(f"  {rule.message}" for rule in RULES),
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the result")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id; the report pins the commit")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, read and write no tensor")
    parser.add_argument("--overwrite", action="store_true", help="make the folder anew, whichever run of ours it is of")
    parser.add_argument("--verify", action="store_true", help="read a complete folder, and make a damaged one anew")
    parser.add_argument("--shard-size", default="5GB", help="of shards that are written anew (default: 5GB)")
    parser.add_argument("--export-as", metavar="FAMILY", help="qwen2_moe: a grouped DeepSeek-MoE as stock Qwen2-MoE")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table, no perplexity, no pictures")
    parser.add_argument("--push-to-hub", metavar="REPO", help="push the result to USER/NAME, privately unless told")
    parser.add_argument("--public", action="store_true", help="--push-to-hub: for everybody to see")
    recipe = parser.add_argument_group("recipe", "every field of a recipe; flags go before the file")
    recipe.add_argument("--recipe", type=Path, metavar="FILE", help="a YAML file of the fields below")
    for spec in fields(Recipe):
        choices, kind = spec.metadata.get("choices"), spec.metadata.get("kind", str)
        default = "" if spec.default is None else f" (default: {str(spec.default).lower()})"
        recipe.add_argument(
            f"--{spec.name.replace('_', '-')}",
            metavar="|".join(choices or FLAGS) if choices or kind is bool else kind.__name__.upper(),
            help=spec.metadata["help"].replace("%", "%%") + default,
        )
    return parser


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe file with the flags over it."""
    values = read_yaml(options.recipe) if options.recipe else {}
    for spec in fields(Recipe):
        text = getattr(options, spec.name)
        if text is not None:
            kind = spec.metadata.get("kind", str)
            try:
                values[spec.name] = FLAGS.get(text, text) if kind is bool else kind(text)
            except ValueError as error:
                raise RecipeError(f"recipe field '{spec.name}' is {text!r}; accepted: {kind.__name__}") from error
    return Recipe.from_dict(values)


def _patch(options: argparse.Namespace) -> int:
    console = Console(stderr=True, quiet=options.quiet)
    if options.quiet:
        disable_progress_bars()  # of downloads
    recipe = recipe_of(options)
    target = _target(options)
    checkpoint = (peek if options.dry_run else resolve)(options.model, options.revision)
    plan = make_plan(checkpoint, recipe, options.shard_size, options.export_as, reads_text=not options.dry_run)
    if line := left_out_line(plan.left_out):
        console.print(line, soft_wrap=True, markup=False)
    folder = OutputFolder(options.out, plan.run, checkpoint.identity, options.verify)
    if options.dry_run:
        # Whose run a folder is cannot be told from a Hub id's headers alone, nor without the text.
        folder.check(options.overwrite or checkpoint.commit is not None or recipe.calibrated)
        _print_dry_run(describe(plan, options.out), plan)
        return 0
    if not options.overwrite and folder.complete:
        run_plan(plan, options.out)
        said = f"{marked(options.out)} is complete: this model was patched with this recipe before"
        console.print(said, soft_wrap=True)
        return _pushed(options, target)
    if not options.overwrite and folder.finished:
        said = f"{marked(options.out)} is not complete: {marked(folder.fault)}; it is made anew"
        console.print(said, soft_wrap=True)
    report = _patched(plan, options, console)
    if not options.quiet:
        report = _score(checkpoint, options.out, report, console)
        _print_report(report, options.out)
        if recipe.merge == "grouped" and not recipe.calibrated and plan.kept < plan.shape.experts:
            hint = "merged without calibration text; --fit router reads some, and keeps far more of the model"
            console.print(hint, soft_wrap=True)
        _draw(options.out, checkpoint.size, report, console)
    return _pushed(options, target)


def _patched(plan: Plan, options: argparse.Namespace, console: Console) -> Report:
    """Carry the plan out, with its progress on the console."""
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    if effort := effort_of(plan):
        console.print(_said(effort, plan), soft_wrap=True)
    hidden = options.quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task("patching", total=None)
        forecast = Forecast(plan.shape.layers, plan.text.tokens, console) if plan.text else None

        def advance(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)
            if forecast is not None:
                forecast.hear(what)

        with _memory_named(plan):
            return run_plan(plan, options.out, overwrite=options.overwrite, verify=options.verify, progress=advance)


@contextmanager
def _memory_named(plan: Plan) -> Iterator[None]:
    """Raises:
    CheckpointError: there was too little memory; it says how much this plan needs.
    """
    try:
        yield
    except Exception as error:
        if said := of_memory(error):
            needed = f"this run needs about {_size(plan.peak_bytes)} beside the libraries"
            raise CheckpointError(f"{said}; {needed}") from error
        raise


def _target(options: argparse.Namespace) -> Target | None:
    """Where the result is to be pushed, if it is; that it can be is asked before anything is read."""
    if options.push_to_hub is None:
        if options.public:
            raise PublishError("--public says who may see what --push-to-hub REPO pushes, which is missing")
        return None
    check_repo(options.push_to_hub)
    if not options.dry_run:
        check_access(options.push_to_hub)
    return Target(options.push_to_hub, options.public)


def _pushed(options: argparse.Namespace, target: Target | None) -> int:
    if target is not None:
        from .commands.push import publish  # which is a command like these

        publish(options.out, target, options.quiet)
    return 0


class Forecast:
    """Says, when the first layer on calibration text is done, how long the others will take, if that is long."""

    def __init__(self, layers: Sequence[int], tokens: int, console: Console) -> None:
        self.left, self.tokens, self.console = len(layers), tokens, console
        self.said, self.inside, self.start = False, False, time.perf_counter()

    def hear(self, what: str) -> None:
        """Args: what, as `run_plan` tells of its progress: ``layer 3: merged`` within a layer, ``layer 3`` after it."""
        if what.endswith(": measured"):  # a pass of its own over all layers, before the first is merged
            self.start = time.perf_counter()
            return
        if ": " in what:
            self.inside = True
            return
        if what.startswith("layer "):
            self.left -= 1
        seconds = time.perf_counter() - self.start
        if self.inside and not self.said and seconds * self.left >= FORECAST_SECONDS:
            self.said = True
            self.console.print(
                f"{what}: {seconds:.1f} s, {1000 * seconds / self.tokens:.2f} ms a token; about "
                f"{seconds * self.left / 60:.0f} min for the {self.left} layers to come",
                soft_wrap=True,
            )
        self.inside, self.start = False, time.perf_counter()


def _score(checkpoint: Checkpoint, out: Path, report: Report, console: Console) -> Report:
    """Perplexity before and after, and how routing changed, where the model is small enough to run here."""
    from .patching.compared import compared_on_held_out
    from .scoring.compare import compare

    if not has_tokenizer(checkpoint.folder):
        console.print("no tokenizer in the checkpoint: perplexity is skipped")
        return report
    if checkpoint.size > SCORED_BYTES:
        console.print(f"{checkpoint.size / 1e9:.1f} GB is too large to score here: perplexity is skipped")
        return report
    try:
        with console.status("perplexity before and after"):
            report = report.with_perplexity(compare(checkpoint.folder, out, SCORED_TOKENS))
            if report.run["recipe"]["routing"] != "linear" and not all("routing" in one for one in report.layers):
                report = report.with_routing(compared_on_held_out(out, SCORED_TOKENS))
    except Exception as error:  # whatever a foreign tokenizer raises: the patched folder itself is whole
        console.print(f"perplexity cannot be measured and is skipped: {marked(f'{type(error).__name__}: {error}')}")
        return report
    rewrite_report(out, report)
    return report


def _draw(out: Path, size: int, report: Report, console: Console) -> None:
    """The pictures of a folder that is whole already, and their links in its card; without them it stays as it is.

    Args:
        size: bytes of the original; the pictures of a large one are a step of their own, ``namex-report``.
        report: the folder's, perplexity included.
    """
    later = f"namex-report {marked(out)}"
    if size > DRAWN_BYTES:
        console.print(f"pictures: {later}", soft_wrap=True)
        return
    from .commands.report import write_pictures  # which is a command like these

    try:
        page = write_pictures(out, console=console)
        rewrite_report(out, report)  # the card links the pictures that are there
    except Exception as error:  # whatever comes of drawing: the patched folder itself is whole
        said = str(error) if isinstance(error, NamexError) else f"{type(error).__name__}: {error}"
        console.print(f"no pictures: {marked(said)}; once that is mended: {later}", soft_wrap=True)
        return
    console.print(f"pictures: [bold]{marked(page)}[/bold]", soft_wrap=True)


def _said(effort: Effort, plan: Plan) -> str:
    """What the fit of whole layers will take at least."""
    seconds, layers = effort.seconds(measured_speed(plan)), len(plan.shape.layers)
    time_left = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return (
        f"{layers} layers fitted, each in {effort.steps} steps, {effort.operations / 1e12:.3g} T operations: at least "
        f"{time_left} a layer at the speed that such products have here; about {_size(plan.peak_bytes)} of memory"
    )


def _print_dry_run(what: dict[str, Any], plan: Plan) -> None:
    recipe = plan.recipe
    table = Table(title="dry run: nothing was read but headers, nothing was written", show_header=False, min_width=60)
    table.add_row("recipe", f"{recipe.merge}, {recipe.method}, {recipe.routing} routing")
    table.add_row("MoE layers", str(what["layers"]))
    table.add_row("routed experts a layer", f"{what['experts']} -> {what['kept']}")
    table.add_row("bytes in", _size(what["bytes_in"]))
    table.add_row("bytes out", _size(what["bytes_out"]))
    table.add_row("peak memory (estimate)", _size(what["peak_bytes"]))
    if what["calibration_tokens"]:
        text = f"{what['calibration_tokens']} tokens of {recipe.calibration_data}, not read yet"
        table.add_row("calibration text", marked(text))
    if what["fit"]:
        table.add_row("fit", _said(what["fit"], plan))
    if what["curvature_parameters"]:
        table.add_row("trainable curvature", _counts(what["curvature_parameters"]))
    table.add_row("disk needed / free", f"{_size(what['space_needed'])} / {_size(what['free'])}")
    table.add_row("files carried over", marked(", ".join(what["carried"])) or "none")
    Console().print(table)


def _print_report(report: Report, out: Path) -> None:
    console, recipe = Console(), report.run["recipe"]
    what = ", ".join((recipe["method"], recipe["merge"], f"{recipe['routing']} routing"))
    table = Table(title=f"{marked(report.source['name'])}: {what}")
    titles, rows = layer_table(report)
    for title, *cells in zip(titles, *rows, strict=True):
        one_word = not any(" " in text for text in (title, *cells))  # where the screen is narrow, others are wrapped
        table.add_column(title, justify="left" if title == "status" else "right", no_wrap=one_word)
    for row in rows:
        table.add_row(*row)
    if report.layers:
        console.print(table)
    if text := report.run.get("calibration"):
        seconds = sum(layer["seconds"] for layer in report.layers) / len(report.layers)
        console.print(
            f"calibrated on {text['tokens']} tokens of {marked(text['name'])}: {seconds:.2f} s a layer, "
            f"{1000 * seconds / text['tokens']:.3f} s for 1,000 tokens",
            soft_wrap=True,
        )
    if report.perplexity:
        scores = Table(title=f"perplexity, the first {SCORED_TOKENS} tokens of each held-out text")
        for column in ("domain", "before", "after", "ratio"):
            scores.add_column(column, justify="right")
        for domain, value in report.perplexity.items():
            before, after = value["before"], value["after"]
            scores.add_row(domain, f"{before:.2f}", f"{after:.2f}", f"{ratio(value):.3f}")
        console.print(scores)
    totals = report.totals
    if "curvature_parameters" in totals:
        console.print(f"trainable curvature, the identity so far: {_counts(totals['curvature_parameters'])}")
    if "spectral_radius" in totals:
        radius, over = totals["spectral_radius"], totals["spectral_radius_over_layers"]
        warning = "" if radius < 1 else " [bold red]warning: 1 or more, the walk of the base does not settle[/bold red]"
        console.print(f"spectral radius of the walk: {radius:.3f} a layer, {over:.3g} over its layers{warning}")
    console.print(
        f"{_size(totals['bytes_in'])} in, {_size(totals['bytes_out'])} out, {totals['seconds']:.1f} s, "
        f"peak memory {_size(totals['peak_resident_bytes'])}: [bold]{marked(out)}[/bold]",
        soft_wrap=True,
    )


def _inspect(options: argparse.Namespace) -> int:
    table = Table(show_header=False, min_width=60)
    for name, value in inspection(peek(options.model, options.revision)).items():
        table.add_row(name, _size(value) if name.startswith("bytes") else marked(value))
    Console().print(table)
    return 0


def _counts(parameters: dict[str, int]) -> str:
    return ", ".join(f"{number:,} parameters {of}" for of, number in parameters.items())


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError
