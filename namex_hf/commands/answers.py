"""``namex answers``: calibration text that a model writes itself."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..printable import marked
from .common import MODEL_HELP, Parser, command_parser, loading, print_json, run

TOKENS, ANSWER_TOKENS, LONGEST, BATCH = 65536, 512, 16384, 32


def main(arguments: Sequence[str] | None = None, prog: str = "namex-answers") -> int:
    """Entry point of ``namex answers``."""
    return run(parser_of(prog), arguments, _answers)


def parser_of(prog: str = "namex answers") -> Parser:
    parser = command_parser(
        prog,
        "Let a model answer the chats of a set, as calibration text for itself: 'namex patch --calibration-data FILE'\n"
        "takes the file. The whole model is in memory. A run that was killed is continued by the same command.",
        ("tiny --out answers.jsonl", "Qwen/Qwen3-30B-A3B --out answers.jsonl --chats HuggingFaceTB/smoltalk:all"),
        usage="MODEL --out FILE [options]",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .jsonl file, a chat a line")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--chats",
        default="packaged",
        metavar="SET",
        help="whose turns are answered, the assistant's left out: packaged, a .jsonl file of messages, or a Hub data "
        "set (default: %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="of all chats (default: %(default)s)")
    parser.add_argument(
        "--answer-tokens",
        type=int,
        default=ANSWER_TOKENS,
        metavar="N",
        help=f"of an answer, reasoning included, at most {LONGEST} (default: %(default)s)",
    )
    parser.add_argument("--temperature", type=float, help="of sampling (default: greedy)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH, metavar="N", help="chats together (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: an accelerator if there is one)")
    parser.add_argument("--overwrite", action="store_true", help="begin the file anew")
    parser.add_argument("--json", action="store_true", help="print file and tokens as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("tokens", "answer_tokens", "batch"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: accepted: numbers from 1")
    if options.answer_tokens > LONGEST:
        raise UsageError(f"--answer-tokens {options.answer_tokens}: accepted: at most {LONGEST}")
    if options.temperature is not None and not 0 < options.temperature <= 10:
        raise UsageError(f"--temperature {options.temperature}: accepted: numbers above 0, up to 10; greedy without it")
    if options.out.suffix != ".jsonl":
        raise UsageError(f"--out {options.out}: accepted: a name that ends in .jsonl")


def _answers(options: argparse.Namespace) -> int:
    _check(options)
    with loading():
        from rich.console import Console
        from rich.progress import Progress, TimeRemainingColumn

        from ..calibration.chats import read_chats
        from ..checkpoint.resolve import resolve
        from ..evaluation.loading import load, tokenizer_of
        from ..evaluation.own_answers import AnswerChoices, AnswerFile, hash_of, write_answers
        from ..families.family import context_of
        from ..patching.device import resolved

    checkpoint = resolve(options.model, options.revision)
    tokenizer = tokenizer_of(checkpoint.folder)
    longest = context_of(checkpoint.config)
    if longest is not None and options.answer_tokens >= longest:
        raise UsageError(f"--answer-tokens {options.answer_tokens}: {checkpoint.name} was made for {longest} tokens")
    if not tokenizer.chat_template:
        raise UsageError(f"{checkpoint.name}: the tokenizer has no chat template, so the model answers no chats")
    chats = read_chats(options.chats, options.seed)
    choices = options.answer_tokens, options.temperature, options.seed, options.batch
    file = AnswerFile(options.out, AnswerChoices(checkpoint.fingerprint(), hash_of(chats), *choices))
    if options.overwrite:
        file.begin_anew()
    file.read(len(chats))  # which refuses a file of another run before the model is read
    model = load(checkpoint.folder, "auto").to(resolved(options.device))
    console = Console(stderr=True, quiet=options.quiet)
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    with Progress(*columns, console=console, disable=options.quiet or not console.is_terminal) as shown:
        task = shown.add_task("answers, tokens", total=options.tokens)
        count = write_answers(
            model, tokenizer, chats, file, options.tokens, lambda event: shown.update(task, completed=event.done)
        )
    if options.json:
        print_json({"file": str(options.out), "tokens": count})
        return 0
    console.print(f"{count:,} tokens; the text is taken by --calibration-data {marked(options.out)}", soft_wrap=True)
    return 0
