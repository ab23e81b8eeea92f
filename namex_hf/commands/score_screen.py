"""What ``namex score`` does and shows: models scored, the report written, tables printed."""

import argparse
import contextlib
import logging
import os
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import UsageError
from ..evaluation.candidates import candidates, lacking_originals
from ..evaluation.checks import check_fits
from ..evaluation.paper import Paper
from ..evaluation.tasks import load_tasks
from ..evaluation.zero_shot import ZeroShotOptions, ZeroShotRun, is_first
from ..evaluation.zero_shot_report import CHOICES, markdown, sentence, table
from ..files import write_text
from ..printable import marked, printable
from ..resources import beside, recipe_path

RECIPES = ("namex-full", "ep-camex", "grouped-12")
"""Of ``eval/recipes``: what is scored where no model is named."""


def score(options: argparse.Namespace) -> int:
    """Score what the command line asks for, and write and print the report."""
    _hush()
    console = Console(quiet=options.quiet or not is_first())
    device = _device(options.device)
    names = [name for text in options.tasks for name in text.split(",") if name and name != "none"]
    recipes = [recipe_path(text, "--recipes") for text in options.recipes or []]
    if options.recipes is None and not options.models:
        recipes = [beside("eval") / "recipes" / f"{name}.yaml" for name in RECIPES]
    rows = candidates(options.models or ["tiny"], recipes, options.revision, options.trust_remote_code)
    check_fits(rows, device, options.dtype, options.parallelize)
    with console.status("tasks and their data"):
        tasks = load_tasks(
            names,
            options.texts,
            include=beside("eval") / "tasks",
            data=options.data,
            num_fewshot=options.num_fewshot,
            seed=options.seed,
        )
    same = [one.name for one in fields(ZeroShotOptions) if one.name not in ("out", "device")]
    chosen_options = ZeroShotOptions(options.out, device, **{name: getattr(options, name) for name in same})
    paper = Paper(beside("eval") / "paper_tables.json", options.stage)
    report = ZeroShotRun(rows, tasks, chosen_options, paper, lambda title: _progress(title, console)).report()
    if is_first():
        report = replace(report, run={**report.run, "commit": _commit()})
        write_text(options.out / "report.json", report.to_json())
        write_text(options.out / "report.md", markdown(report))
        _print(report, console)
        for name in lacking_originals(rows):
            more = shlex.join(("namex", "score", *(options.models or ["tiny"]), name))
            console.print(f"beside the model that it was made of: {printable(more)}", soft_wrap=True, markup=False)
        console.print(f"[bold]{marked(options.out / 'report.md')}[/bold]", soft_wrap=True)
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
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _print(report: Any, console: Console) -> None:

    for task in dict.fromkeys(score.task for score in report.scores):
        whole = table(report, task)
        # The rest is in report.md; here the model's label tells its recipe.
        shown = whole.only(at for at, title in enumerate(whole.titles) if title not in (*CHOICES, "95 %"))
        console.print(*shown.screens(console.width, task, ("metric", "to")))
        for one in report.scores:
            if one.task == task and (text := sentence(one)):
                console.print(f"  {printable(text)}", soft_wrap=True, markup=False, highlight=False)
