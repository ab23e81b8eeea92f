"""Zero-shot scores of models and recipes, side by side: ``python eval/zero_shot.py --help``."""

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars, a dozen a task; tqdm reads it when it is imported

import namex_hf.commands.common  # noqa: F401  (the first: Ctrl-C is answered while the others are imported)

# isort: split
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from namex_hf.commands.common import Parser, ended
from namex_hf.errors import MissingExtraError, UsageError
from namex_hf.files import write_text
from namex_hf.printable import marked, printable

HERE = Path(__file__).resolve().parent
PACKAGED_TASKS = ("namex_definitions", "namex_sums", "namex_word_problems", "namex_text")
RECIPES = tuple(HERE / "recipes" / f"{name}.yaml" for name in ("namex-full", "ep-camex", "grouped-12"))

EXAMPLES = """\
examples:
  python eval/zero_shot.py
      the packaged model and three recipes on the packaged sets: offline, minutes on two cores
  python eval/zero_shot.py --models Qwen/Qwen1.5-MoE-A2.7B out/qwen --tasks mmlu,gsm8k,gsm8k:5,arc_challenge,arc_easy
      a model and a patched folder on lm-eval's own tasks, GSM8K without examples and with five
  python eval/zero_shot.py --models deepseek-ai/deepseek-moe-16b-base --tasks mmlu --recipe patches/deepseek-moe-16b/*
      rows of the paper's table: every recipe is applied below --output_path, then scored
  python eval/zero_shot.py --tasks gsm8k --data data --limit 200
      an official task on a local copy of its data set (data/openai/gsm8k, see eval/make_local_gsm8k.py)
  python eval/zero_shot.py --tasks none --text book.txt
      perplexity of a text
  accelerate launch --multi_gpu --num_processes 4 eval/zero_shot.py --models out/qwen --tasks mmlu
      a copy of the model on each of four GPUs; --parallelize spreads one copy over all

The same command goes on where a run was stopped. docs/evaluation.md says what is measured and how.
"""


def parser() -> Parser:
    made = Parser(
        prog="zero_shot.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Score models on lm-eval's tasks and on the packaged sets, compare each with the model it was\n"
        "made of on the same items, and put the paper's numbers beside.\n\n"
        '"Zero-shot" has two readings: no worked examples in the prompt, or no tuning. Nothing is tuned here. The\n'
        "number of examples is stated for each task: --tasks gsm8k:5,mmlu:0 (default: none).",
        epilog=EXAMPLES,
    )
    models = made.add_argument_group("models")
    models.add_argument(
        "--models",
        "--model",
        nargs="+",
        metavar="MODEL",
        help="folders, patched or not, Hub ids, tiny, tiny-deepseek, tiny-qwen3 (default: tiny)",
    )
    models.add_argument(
        "--recipe",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="recipes applied to every model, each a row more (default: without --models those of eval/recipes)",
    )
    models.add_argument("--revision", help="branch, tag or commit of a Hub id; the report pins the commit")
    models.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with a model; the patched models of this package need none",
    )
    tasks = made.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        default=list(PACKAGED_TASKS),
        help="lm-eval's tasks and groups, arc for arc_challenge and arc_easy, or "
        f"{', '.join(PACKAGED_TASKS)} (default: these four); TASK:N with N worked "
        "examples in the prompt, such as gsm8k:5 mmlu:0; none: only --text",
    )
    tasks.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="perplexity of text files as well"
    )
    tasks.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of local data sets under their Hub names, such as DIR/openai/gsm8k",
    )
    tasks.add_argument(
        "--num_fewshot",
        "--num-fewshot",
        type=_count(0),
        default=0,
        metavar="N",
        help="worked examples before each question of a task that states none with its name (default: 0)",
    )
    tasks.add_argument(
        "--apply_chat_template",
        "--apply-chat-template",
        action="store_true",
        help="ask in the model's chat format, worked examples as turns before the question",
    )
    tasks.add_argument("--limit", type=_count(1), metavar="N", help="only the first N items of every task")
    how = made.add_argument_group("how")
    how.add_argument(
        "--output_path",
        "--output-path",
        type=Path,
        default=Path("out/zero-shot"),
        metavar="DIR",
        help="results, samples, patched models and the report (default: out/zero-shot)",
    )
    how.add_argument("--overwrite", action="store_true", help="score again what another run has left there")
    how.add_argument("--device", help="such as cpu, cuda, cuda:1 (default: the accelerator if there is one)")
    how.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights (default: auto, the model's own)",
    )
    how.add_argument(
        "--batch_size",
        "--batch-size",
        default="auto",
        type=_batch,
        metavar="N|auto",
        help="sequences at once (default: auto, found for each kind of request)",
    )
    how.add_argument("--parallelize", action="store_true", help="one model over all GPUs (device_map auto)")
    how.add_argument("--seed", type=_count(0, 2**32 - 1), default=1234, help="default: 1234, lm-eval's own")
    how.add_argument(
        "--stage",
        choices=("zero-shot", "fine-tuned"),
        default="zero-shot",
        help="which of the paper's columns stands beside: without tuning (zero-shot, whatever the examples in the "
        "prompt, of which the paper gives no number) or after training on SmolTalk",
    )
    how.add_argument("--quiet", action="store_true", help="no progress, no table")
    return made


def _count(least: int, most: int = 2**63 - 1) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 20 or not least <= int(text) <= most:
            upto = f" to {most}" if most < 2**63 - 1 else ""
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: a whole number from {least}{upto}")
        return int(text)

    return number


def _batch(text: str) -> str:
    return text if text == "auto" else str(_count(1)(text))


def main() -> int:
    made = parser()
    options = made.parse_args()
    return ended(made.prog, lambda: score(options))


def score(options: argparse.Namespace) -> int:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("eval/zero_shot.py", "eval") from error
    _hush()
    from namex_hf.evaluation.candidates import candidates
    from namex_hf.evaluation.checks import check_fits
    from namex_hf.evaluation.paper import Paper
    from namex_hf.evaluation.tasks import load_tasks
    from namex_hf.evaluation.zero_shot import ZeroShotOptions, ZeroShotRun, is_first
    from namex_hf.evaluation.zero_shot_report import markdown

    console = Console(quiet=options.quiet or not is_first())
    device = _device(options.device)
    names = [name for text in options.tasks for name in text.split(",") if name and name != "none"]
    recipes = list(RECIPES) if options.recipe is None and options.models is None else options.recipe or []
    rows = candidates(options.models or ["tiny"], recipes, options.revision, options.trust_remote_code)
    check_fits(rows, device, options.dtype, options.parallelize)
    with console.status("tasks and their data"):
        tasks = load_tasks(
            names,
            options.text,
            include=HERE / "tasks",
            data=options.data,
            num_fewshot=options.num_fewshot,
            seed=options.seed,
        )
    same = [one.name for one in fields(ZeroShotOptions) if one.name not in ("out", "device")]
    chosen_options = ZeroShotOptions(options.output_path, device, **{name: getattr(options, name) for name in same})
    paper = Paper(HERE / "paper_tables.json", options.stage)
    report = ZeroShotRun(rows, tasks, chosen_options, paper, lambda title: _progress(title, console)).report()
    if is_first():
        report = replace(report, run={**report.run, "commit": _commit()})
        write_text(options.output_path / "report.json", report.to_json())
        write_text(options.output_path / "report.md", markdown(report))
        _print(report, console)
        console.print(f"[bold]{marked(options.output_path / 'report.md')}[/bold]", soft_wrap=True)
    return 0


def _device(name: str | None) -> str:
    """The accelerator, if there is one and nothing else is said.

    Raises:
        NamexError: a device that this machine has not.
    """
    there = ["cpu"]
    if torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator())
        there += [kind, *(f"{kind}:{number}" for number in range(torch.accelerator.device_count()))]
    if name is not None and name not in there:
        raise UsageError(f"--device {name} is no device of this machine; accepted: {', '.join(there)}")
    return name or (there[1] if len(there) > 1 else "cpu")


def _hush() -> None:
    """What the libraries say of their own workings; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lm_eval", "datasets", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers|torch|datasets")
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()


@contextlib.contextmanager
def _progress(title: str, console: Console) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = console.quiet or not console.is_terminal
    if hidden:
        console.print(printable(title), soft_wrap=True, markup=False)
    with Progress(*columns, console=console, disable=hidden, transient=True) as shown:
        bar = shown.add_task(marked(title), total=None)
        yield lambda event: shown.update(bar, advance=event.amount, total=event.total)


def _commit() -> str | None:
    """Of this checkout, if it is one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _print(report: Any, console: Console) -> None:
    from namex_hf.evaluation.zero_shot_report import CHOICES, sentence, table

    for task in dict.fromkeys(score.task for score in report.scores):
        whole = table(report, task)
        # The rest is in report.md; here the model's label tells its recipe.
        shown = whole.only(at for at, title in enumerate(whole.titles) if title not in (*CHOICES, "95 %"))
        console.print(*shown.screens(console.width, task, ("metric", "to")))
        for one in report.scores:
            if one.task == task and (text := sentence(one)):
                console.print(f"  {printable(text)}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
