"""``namex-patch``: merge the experts of a checkpoint."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from rich.console import Console

from ..checkpoint.folder import OutputFolder
from ..checkpoint.layout import left_out_line
from ..checkpoint.resolve import peek, resolve
from ..errors import RecipeError
from ..hub.client import check_repo
from ..hub.errors import PublishError
from ..hub.publish import publish
from ..hub.push import Target, check_access
from ..patching.patch import describe, run_plan
from ..patching.plan import make_plan
from ..printable import marked
from ..recipe import RULES, Recipe, read_yaml
from .common import MODEL_HELP, Parser, run
from .patch_screen import draw, print_dry_run, print_report, run_with_progress, score

FLAGS = {"false": False, "true": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``namex-patch``."""
    parser = _patch_parser()
    return run(parser, arguments, _patch)


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
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
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
        print_dry_run(describe(plan, options.out), plan)
        return 0
    if not options.overwrite and folder.complete:
        run_plan(plan, options.out)
        said = f"{marked(options.out)} is complete: this model was patched with this recipe before"
        console.print(said, soft_wrap=True)
        return _pushed(options, target)
    if not options.overwrite and folder.finished:
        said = f"{marked(options.out)} is not complete: {marked(folder.fault)}; it is made anew"
        console.print(said, soft_wrap=True)
    report = run_with_progress(plan, options, console)
    if not options.quiet:
        report = score(checkpoint, options.out, report, console)
        print_report(report, options.out)
        if recipe.merge == "grouped" and not recipe.calibrated and plan.kept < plan.shape.experts:
            hint = "merged without calibration text; --fit router reads some, and keeps far more of the model"
            console.print(hint, soft_wrap=True)
        draw(options.out, checkpoint.size, report, console)
    return _pushed(options, target)


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
        publish(options.out, target, options.quiet)
    return 0
