"""``namex patch``: merge the experts of a checkpoint."""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from sys import stderr
from typing import TYPE_CHECKING, Any

from ..defaults import SHARD_SIZE
from ..errors import UsageError
from ..files import REPORT, locate, read_json
from ..printable import marked
from ..recipe import Recipe
from .common import MODEL_HELP, Parser, command_parser, loading, print_json, run
from .next_commands import print_next
from .recipe_options import add_recipe_options, recipe_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoint.source import Checkpoint
    from ..patching.plan import Plan
    from ..patching.run import Run

BITS = (8, 4, 3, 2)
COMMON_OPTIONS = ("model", "out", "dry_run", "json", "quiet", "push_to_hub", "recipe", "size")
"""What ``--help`` shows; ``--help-all`` shows the rest too."""


def main(arguments: Sequence[str] | None = None, prog: str = "namex-patch") -> int:
    """Entry point of ``namex-patch`` and ``namex patch``."""
    return run(parser_of(prog), arguments, _patch)


def parser_of(prog: str = "namex patch") -> Parser:
    parser = command_parser(
        prog,
        "Make a Mixture-of-Experts checkpoint smaller (--keep, --size), or merge its experts with NAMEx\n"
        "(Nash bargaining, the default, which makes nothing smaller).\n"
        "One or two layers are in memory at a time. A run that was killed is continued by the same command.",
        (
            "tiny --out out/half --keep 0.5",
            "tiny --out out/tiny",
            "Qwen/Qwen1.5-MoE-A2.7B --out out/qwen --recipe qwen1.5-moe-a2.7b/namex-full",
        ),
        usage="MODEL --out DIR [options]",
        brief=COMMON_OPTIONS,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the result")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id; the report pins the commit")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, read and write no tensor")
    parser.add_argument("--json", action="store_true", help="print the dry run or the report as JSON, no tables")
    parser.add_argument("--overwrite", action="store_true", help="make the folder anew, whichever run of ours it is of")
    parser.add_argument("--verify", action="store_true", help="read a complete folder, and make a damaged one anew")
    parser.add_argument(
        "--shard-size", default=SHARD_SIZE, help="of shards that are written anew (default: %(default)s)"
    )
    parser.add_argument("--export-as", metavar="FAMILY", help="qwen2_moe: a grouped DeepSeek-MoE as stock Qwen2-MoE")
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="DIR",
        help="a result of the same model and text: its scores of experts are used",
    )
    parser.add_argument(
        "--moments",
        type=Path,
        metavar="DIR",
        help="narrow without a fit, --sweeps 0: what the text says of neurons is saved there, and used again for "
        "another width of the same model and text",
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="DIR",
        help="in place of text: what --moments has saved there of another model of this shape, such as the base model",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, no table, no perplexity, no pictures")
    parser.add_argument("--push-to-hub", metavar="REPO", help="push the result to USER/NAME, privately by default")
    parser.add_argument("--public", action="store_true", help="--push-to-hub: for everybody to see")
    parser.add_argument(
        "--recipe", metavar="FILE|NAME", help="a YAML file, or a name of 'namex recipes'; fields below go before it"
    )
    add_recipe_options(parser)
    parser.options["--keep"].nargs = "+"
    parser.add_argument("--size", help="in place of --keep: the largest result of at most this size, such as 16GB")
    parser.add_argument(
        "--bits",
        type=int,
        choices=BITS,
        help="of --size: the size is that of the result once its routed experts are quantised to so many bits and the "
        "other matrices of its layers to 8; it is written in 16",
    )
    return parser


def _patch(options: argparse.Namespace) -> int:
    """One result, or one in ``DIR/keep-SHARE`` for each of several shares."""
    shares = _shares(options)
    folders = [options.out / f"keep-{share}" if len(shares) > 1 else options.out for share in shares]
    stated = zip(shares, folders, strict=True)
    each = [argparse.Namespace(**{**vars(options), "keep": share, "out": out}) for share, out in stated]
    recipes = [recipe_of(one) for one in each]  # which refuses a bad share before anything is done
    results = _results(each, recipes)
    if options.json:
        print_json(dict(zip(shares, results, strict=True)) if len(shares) > 1 else results[0])
    elif not (options.quiet or options.dry_run):
        print_next(options, recipes[0], folders)
    return 0


def _shares(options: argparse.Namespace) -> list[str | None]:
    """The shares that are asked for; None: the recipe states no share."""
    shares = options.keep or [None]
    if options.bits is not None and options.size is None:
        raise UsageError("--bits says what --size is the size of; found no --size")
    if options.size is not None:
        if any(value is not None for value in (options.keep, options.width, options.experts)):
            raise UsageError("--size stands in the place of --keep, --width and --experts")
        shares = ["0.5"]  # until the model's numbers are known
    if len(set(shares)) < len(shares):
        raise UsageError(f"--keep {' '.join(shares)}: a share is stated twice")
    if len(shares) > 1 and options.push_to_hub is not None:
        raise UsageError("--push-to-hub pushes one result: with several shares call namex-push for each folder")
    return shares


def _results(each: Sequence[argparse.Namespace], recipes: Sequence[Recipe]) -> list[Any]:
    """Carry recipes out, or say what they would do; returns that, or the reports, as JSON values."""
    with loading():
        from huggingface_hub.utils import disable_progress_bars
        from rich.console import Console

        from ..checkpoint.resolve import peek, resolve
        from ..hub.publish import checked_target, publish
        from ..patching.together import share_reading
        from .patch_screen import print_room

    options = each[0]
    console = Console(stderr=True, quiet=options.quiet)
    if options.quiet:
        disable_progress_bars()  # of downloads
    target = checked_target(options.push_to_hub, options.public, asks=not options.dry_run)
    checkpoint = (peek if options.dry_run else resolve)(options.model, options.revision)
    runs = [_checked(checkpoint, recipe, one, console) for recipe, one in zip(recipes, each, strict=True)]
    together = share_reading(runs)
    if options.dry_run:
        forecasts = [_dry_run(run, console, options.json) for run in runs]
        if len(runs) > 1 and not options.json:
            print_room(forecasts, together)
        return forecasts
    for group in [runs] if together else [[one] for one in runs]:
        _carry_out(group, options, console)
    if target is not None:
        with redirect_stdout(stderr) if options.json else nullcontext():
            publish(options.out, target, options.quiet)
    return [read_json(locate(one.out, REPORT)) for one in each]


def _checked(checkpoint: "Checkpoint", recipe: Recipe, options: argparse.Namespace, console: "Console") -> "Run":
    """The run of a recipe, for a folder that it may write."""
    from ..calibration.sources import is_own_text
    from ..checkpoint.layout import left_out_line
    from ..checkpoint.tokenizer_code import code_line
    from ..patching.device import ACCELERATORS, is_there
    from ..patching.plan import make_plan
    from ..patching.run import Run
    from .patch_warnings import width_line

    if options.dry_run and recipe.device.split(":")[0] in ACCELERATORS and not is_there(recipe.device):
        console.print(f"no device {marked(recipe.device)} here: checked for the CPU", soft_wrap=True)
        recipe = replace(recipe, device="cpu")
    if options.size is not None:
        recipe = _of_size(checkpoint, recipe, options)
    reads_text = not options.dry_run or (checkpoint.commit is None and is_own_text(recipe.calibration.data))
    how = {"reads_text": reads_text, "like": options.like}
    plan = make_plan(checkpoint, recipe, options.shard_size, options.export_as, **how)
    # A Hub id's headers alone do not say whose run a folder is, nor does a recipe whose text was not read.
    unknown = options.dry_run and (checkpoint.commit is not None or (plan.reads_text and plan.text is None))
    run = Run(plan, options.out, options.scores, options.moments, options.overwrite, options.verify)
    run.check(of_any=unknown)
    for line in filter(None, (left_out_line(plan.left_out), code_line(checkpoint.folder), width_line(plan))):
        console.print(line, soft_wrap=True, markup=False)
    return run


def _of_size(checkpoint: "Checkpoint", recipe: Recipe, options: argparse.Namespace) -> Recipe:
    from ..patching.plan import of_size
    from ..quantising.grid import GROUPS
    from ..quantising.matrices import matrices_of

    if options.bits is None:
        return of_size(checkpoint, recipe, options.size)
    matrices = matrices_of(checkpoint)

    def quantised(plan: "Plan") -> int:
        stored = matrices.storage(options.bits, plan.width)
        return stored.bytes + plan.untied_bytes + plan.padding_bytes

    return of_size(checkpoint, recipe, options.size, quantised, step=GROUPS[0])


def _dry_run(run: "Run", console: "Console", json: bool) -> dict[str, Any]:
    from ..patching.patch import describe
    from ..patching.scores import check_moments, check_reads_scores
    from .patch_screen import print_dry_run
    from .patch_warnings import text_lines, tokens_lines

    plan = run.plan
    if run.scores is not None:
        check_reads_scores(plan.recipe)
    if run.moments is not None:
        check_moments(plan)
    what = describe(plan, run.out, saves_moments=run.moments is not None)
    if not json:
        print_dry_run(what, plan)
    for line in (*tokens_lines(plan), *text_lines(plan)):
        console.print(line, soft_wrap=True, markup=False)
    return what


def _carry_out(runs: list["Run"], options: argparse.Namespace, console: "Console") -> None:
    """Patch into folders that are not complete, in one go; then score, print and draw, unless the run is quiet."""
    from .patch_screen import draw, print_report, run_with_progress, score

    runs = [one for one in runs if not _is_complete(one, console)]
    reports = run_with_progress(runs, options.quiet, console) if runs else []
    for one, report in [] if options.quiet else zip(runs, reports, strict=True):
        plan, checkpoint, recipe = one.plan, one.plan.checkpoint, one.plan.recipe
        report = score(checkpoint, one.out, report, console)
        if not options.json:
            print_report(report, checkpoint, one.out)
        if recipe.merge.kind == "grouped" and not recipe.needs_text and plan.experts < plan.shape.experts:
            hint = "merged without calibration text; --fit router reads some, and keeps far more of the model"
            console.print(hint, soft_wrap=True)
        draw(one.out, checkpoint.size, report, console)


def _is_complete(run: "Run", console: "Console") -> bool:
    """Whether a folder needs no run; says so, or what is wrong with one that was finished."""
    from ..patching.together import run_all

    folder, out = run.folder, marked(run.out)
    if run.overwrite or not folder.finished:
        return False
    if folder.fault:
        console.print(f"{out} is not complete: {marked(folder.fault)}; it is made anew", soft_wrap=True)
        return False
    run_all([run])  # which clears up after a run that was killed at its end
    console.print(f"{out} is complete: this model was patched with this recipe before", soft_wrap=True)
    return True
