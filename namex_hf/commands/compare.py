"""``namex compare``: several recipes on one model, one table and one report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..defaults import KINDS, PROBLEM_SEED, PROBLEM_SEEDS, QUANTISERS, SCORED_TOKENS, WORD_PROBLEMS
from ..errors import UsageError, install
from ..evaluation.grid import field_options, grid, recipe_files
from ..printable import marked, printable
from ..recipe import Recipe
from ..resources import recipe_path
from .common import MODEL_HELP, Parser, command_parser, loading, run
from .recipe_options import add_recipe_options

COMMON_OPTIONS = ("model", "out", "recipes", "equal_bytes", "texts", "tokens", "problems", "kinds", "json", "quiet")
"""What ``--help`` shows; ``--help-all`` shows the rest too."""
FAILED = 1
"""Exit status where a cell failed and the others stand."""


def main(arguments: Sequence[str] | None = None, prog: str = "namex-compare") -> int:
    """Entry point of ``namex-compare`` and ``namex compare``."""
    return run(parser_of(prog), arguments, _compare)


def parser_of(prog: str = "namex compare") -> Parser:
    parser = command_parser(
        prog,
        "Patch one model with several recipes, score each result beside the original, and write one table\n"
        "and one page. A run that was killed is continued by the same command; more recipes may be added to it.\n"
        "A field of a recipe takes one value or more, and goes over what the files say.\n"
        "Exit status: 0, 1 where a recipe failed and the others stand, 2 for bad input.",
        (
            "tiny --merge grouped --experts 12 8 4 --fit none router --out out/compared",
            "tiny --recipes recipes/ --experts 8 --seed 0 1 2 --out out/seeds",
            "tiny --merge narrow --width 40 --equal-bytes --out out/bytes",
        ),
        usage="MODEL --out DIR [options]",
        brief=COMMON_OPTIONS,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="tables, page, and a file a cell")
    parser.add_argument(
        "--recipes",
        "--recipe",
        nargs="+",
        default=[],
        metavar="FILE|NAME",
        help="YAML files, folders of them, or names of 'namex recipes' (default: the default recipe alone)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--texts",
        "--text",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="a domain each (default: packaged held-out texts)",
    )
    parser.add_argument(
        "--tokens", type=int, default=SCORED_TOKENS, metavar="N", help="scored of each text (default: %(default)s)"
    )
    parser.add_argument(
        "--problems",
        type=int,
        default=WORD_PROBLEMS,
        metavar="N",
        help="problems of each kind to answer (default: %(default)s)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=[KINDS[0]],
        metavar="KIND",
        help=f"of problems: {', '.join(KINDS)} (default: {KINDS[0]}, the packaged word problems)",
    )
    parser.add_argument(
        "--problem-seed",
        choices=PROBLEM_SEEDS,
        default=PROBLEM_SEED,
        help="of generated problems: tables for figures, choices to choose by (default: %(default)s)",
    )
    parser.add_argument(
        "--closeness",
        action="store_true",
        help="acceptance and KL divergence to the original on the texts; it is in memory beside each model",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="models side by side; times are then not comparable (default: 1)",
    )
    parser.add_argument("--keep-models", action="store_true", help="keep the patched models, in DIR/models")
    parser.add_argument(
        "--equal-bytes",
        action="store_true",
        help="half of the experts in 16 bit, or all in 4? Score the original in 8, 4, 3 and 2 bit as well, and each "
        "result of a stock class in 8, 4 and 3: a further table, by falling bytes",
    )
    parser.add_argument(
        "--quantiser",
        nargs="+",
        choices=QUANTISERS,
        metavar="|".join(QUANTISERS),
        help="of --equal-bytes. rtn: round to nearest; gptq: later inputs make up for the errors of earlier ones on "
        "calibration text (default: both)",
    )
    parser.add_argument(
        "--gptq-data", metavar="TEXT", help="of --equal-bytes: text for gptq, as --calibration-data (default: packaged)"
    )
    parser.add_argument(
        "--gptq-tokens", type=int, metavar="N", help="of --equal-bytes: tokens of that text (default: 65536)"
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew, also in a folder of another run of ours")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")
    parser.add_argument("--json", action="store_true", help="print comparison.json, no tables")
    add_recipe_options(parser, several=True)
    parser.options["--keep"].nargs = "*"
    return parser


def _compare(options: argparse.Namespace) -> int:
    if options.keep == []:
        raise UsageError("--keep takes shares of the routed parameters, such as 0.5; --keep-models keeps the models")
    if options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: accepted: numbers from 1")
    for name in () if options.equal_bytes else ("quantiser", "gptq_data", "gptq_tokens"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --equal-bytes")
    files = recipe_files([recipe_path(text, "--recipes") for text in options.recipes])
    cells = grid(files, field_options(vars(options)))
    quantisers = tuple(dict.fromkeys(options.quantiser or QUANTISERS)) if options.equal_bytes else ()
    with loading():
        from huggingface_hub.utils import disable_progress_bars
        from rich.console import Console

        from ..evaluation.candidates import resolve_model
        from ..evaluation.compare import RunOptions, compare, make_plan_of
        from ..evaluation.settings import settings
        from ..families import family_of
        from ..patching.device import resolved
        from ..report.comparison import NUMBERS, PAGE, write
        from .compare_screen import Shown, print_tables

    console = Console(stderr=True, quiet=options.quiet)
    if options.quiet:
        disable_progress_bars()
    device = resolved(options.device[0] if options.device else "auto")
    numbers = options.tokens, options.problems
    chosen = settings(options.texts, *numbers, device, options.closeness, options.kinds, options.problem_seed)
    checkpoint = resolve_model(options.model, options.revision, family_of)
    with console.status("checking recipes, reading calibration text"):
        plan = make_plan_of(checkpoint, chosen, cells, quantisers, gptq_text(options.gptq_data, options.gptq_tokens))
    shown = Shown(len(plan.requests), options.jobs, console)
    with shown.progress:
        comparison = compare(
            plan, options.out, RunOptions(options.jobs, options.keep_models, options.overwrite), shown.show
        )
    drawn = write(comparison, options.out)
    if options.json:
        print((options.out / NUMBERS).read_text("utf-8"), end="")
    elif not options.quiet:
        print_tables(comparison)
        if not drawn:
            console.print(f"no picture: it needs the extra 'report': {install('report')}", soft_wrap=True, markup=False)
        Console().print(f"[bold]{marked(options.out / PAGE)}[/bold]", soft_wrap=True)
    for label, reason in comparison.failed.items():
        print(printable(f"namex-compare: {label} failed: {reason}"), file=sys.stderr)
    return FAILED if comparison.failed else 0


def gptq_text(data: str | None, tokens: int | None) -> Recipe:
    """A recipe that reads the text for GPTQ, of which nothing but the text is used. Args: as the options."""
    given = {"calibration_data": data, "calibration_tokens": tokens}
    stated = {name: value for name, value in given.items() if value is not None}
    return Recipe(merge="soft", curvature="calibrated", **stated)
