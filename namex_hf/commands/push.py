"""``namex push``: a patched folder goes to the Hub, once it is known to be whole."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .common import Parser, command_parser, loading, run


def main(arguments: Sequence[str] | None = None, prog: str = "namex-push") -> int:
    """Entry point of ``namex-push`` and ``namex push``."""
    return run(parser_of(prog), arguments, _push)


def parser_of(prog: str = "namex push") -> Parser:
    parser = command_parser(
        prog,
        "Publish a patched folder on the Hub, privately by default, once it is known to load.\n"
        "A push that was broken off is continued by the same command. The token is that of HF_TOKEN or of\n"
        "'hf auth login'.",
        (
            "out/qwen --repo USER/NAME --dry-run",
            "out/qwen --repo USER/NAME --eval out/zero-shot/report.json",
            "out/qwen --repo USER/NAME --public",
        ),
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder of namex-patch or sft_smoltalk.py")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="created if missing")
    parser.add_argument("--public", action="store_true", help="for everybody to see; needed for a public repository")
    parser.add_argument("--revision", metavar="BRANCH", help="created if missing, or refs/pr/N (default: main)")
    parser.add_argument("--pull-request", action="store_true", help="propose it to a repository that is there")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="report.json of zero_shot.py: scores for the card")
    parser.add_argument("--eval-label", metavar="LABEL", help="row of that report, where the weights were copied since")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="FOLDER",
        help="adapter, compare or checkpoint-N of a fine-tuned folder, which stay otherwise; may be repeated",
    )
    parser.add_argument("--verify", action="store_true", help="read all files first, and compare their hashes")
    parser.add_argument("--dry-run", action="store_true", help="check, list what would go up, ask no network")
    parser.add_argument("--quiet", action="store_true", help="nothing but the address")
    parser.set_defaults(prog=prog)
    return parser


def _push(options: argparse.Namespace) -> int:
    if options.eval_label is not None and options.eval is None:
        parser_of(options.prog).error("--eval-label names a row of --eval FILE, which is missing")
    with loading():
        from rich.console import Console

        from ..hub.benchmarks import benchmark_files
        from ..hub.checks import check_folder, check_metadata
        from ..hub.client import check_repo
        from ..hub.files import CARD, select
        from ..hub.publish import send, show
        from ..hub.push import Target
        from ..hub.scores import read_evaluation, row_of, with_scores

    target = Target(options.repo, options.public, options.revision, options.pull_request)
    check_repo(target.repo)
    checked = check_folder(options.folder, options.verify)
    selection = select(checked.checkpoint, tuple(options.include), checked.left_out)
    card = checked.card
    if options.eval is not None:
        evaluation = read_evaluation(options.eval)
        label = row_of(evaluation, options.eval, options.folder, options.eval_label)
        card = with_scores(card, evaluation, label, target.repo.split("/")[1])
        check_metadata(card, options.folder / CARD)
        selection = replace(selection, added=benchmark_files(evaluation, label))
    if not options.quiet:
        show(Console(stderr=not options.dry_run), checked, selection, target)
    if options.dry_run:
        return 0
    send(selection, card, target, options.quiet)
    return 0
