"""The tables of docs/merging.md on smaller models: ``python benchmarks/smaller_tables.py --out DIR``.

Each is a call of ``namex compare`` with a folder of its own, the more important ones first. 1,000 word problems are
generated for each model to answer. All take hours: a run that was killed is continued by the same command, and finished
parts are not made again. ``--only NAME ...`` makes some.
"""

import argparse
import json
from pathlib import Path
from statistics import stdev
from typing import Any

from namex_hf.commands.compare import main as compare
from namex_hf.evaluation.table import Table

KIND = "arithmetic"
MODELS = ("tiny", "tiny-deepseek", "tiny-qwen3")
RECIPES = Path(__file__).parent / "recipes"
FEWER = ("--recipes", RECIPES / "ours" / "namex-full.yaml", RECIPES / "peers" / "reap.yaml", "--fit", "layer")
CHOICES = ("--problem-seed", "choices")  # problems that no other part has
PARTS = {
    "half": ("--keep", 0.5, "--fit", "none", "layer", "--seed", 0, 1, 2),
    "unswept": ("--keep", 0.5, "--sweeps", 0, "--seed", 0, 1, 2),
    "shares": ("--keep", 0.75, 0.25, "--fit", "none", "layer"),
    "half-fewer": (*FEWER, "--keep", 0.5, "--seed", 0, 1, 2),
    "shares-fewer": (*FEWER, "--keep", 0.75, 0.25),
    "controls": ("--keep", 0.5, "--neurons", "energy", "gradient", "random", "--seed", 0, 1, 2),
    "random": ("--keep", 0.75, 0.25, "--neurons", "random"),
    "weights": ("--keep", 0.5, "--fit", "layer", "--error-weights", "none", "sequence", *CHOICES),
    "before": ("--keep", 0.5, "--calibrate", "after", "before", *CHOICES),
    "text": ("--keep", 0.5, "--fit", "none", "layer", "--calibration-tokens", 4096, 16384, 262144),
    "least-text": ("--keep", 0.5, "--calibration-tokens", 1024),  # too little for a fit, which holds some back
}

SEEDS = ", mean of 3 seeds"
ROWS = {
    "all": ("half", "original"),
    "three quarters, `--keep 0.75`": ("shares", "default, keep 0.75, fit none"),
    "three quarters, `--fit layer`": ("shares", "default, keep 0.75, fit layer"),
    "three quarters, neurons at random": ("random", "default, keep 0.75"),
    "12 of 16 experts merged, `--fit layer`": ("shares-fewer", "namex-full, keep 0.75"),
    "12 of 16 experts pruned (REAP), `--fit layer`": ("shares-fewer", "reap, keep 0.75"),
    "half, `--keep 0.5`": ("half", f"default, fit none{SEEDS}"),
    "half, `--sweeps 0`": ("unswept", f"default{SEEDS}"),
    "half, `--fit layer`": ("half", f"default, fit layer{SEEDS}"),
    "half, `--neurons energy`": ("controls", f"default, neurons energy{SEEDS}"),
    "half, `--neurons gradient`": ("controls", f"default, neurons gradient{SEEDS}"),
    "half, neurons at random": ("controls", f"default, neurons random{SEEDS}"),
    "8 experts merged, `--fit layer`": ("half-fewer", f"namex-full{SEEDS}"),
    "8 experts pruned (REAP), `--fit layer`": ("half-fewer", f"reap{SEEDS}"),
    "a quarter, `--keep 0.25`": ("shares", "default, keep 0.25, fit none"),
    "a quarter, `--fit layer`": ("shares", "default, keep 0.25, fit layer"),
    "a quarter, neurons at random": ("random", "default, keep 0.25"),
    "4 experts merged, `--fit layer`": ("shares-fewer", "namex-full, keep 0.25"),
    "4 experts pruned (REAP), `--fit layer`": ("shares-fewer", "reap, keep 0.25"),
}
"""Of the page's first table: the part and the label in its ``comparison.json``."""


def first_table(out: Path, models: list[str]) -> Table:
    """The first table of the page, of what is there; a cell that was not measured is empty."""
    parts = {(part, model): _rows(out / f"{part}-{model}") for part, _ in ROWS.values() for model in models}
    table = Table(["", *(title for model in models for title in (f"`{model}`: mean", "worst", "exact"))], [])
    for name, (part, label) in ROWS.items():
        table.rows.append([name, *(cell for model in models for cell in _cells(parts[part, model], label))])
    return table


def _rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "comparison.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def _cells(rows: list[dict[str, Any]], label: str) -> list[str]:
    """Mean and worst ratio, and exact answers in per cent; over seeds with their standard deviation."""
    row = next((row for row in rows if row["label"] == label), None)
    if row is None:
        return ["", "", ""]
    exact = [100 * one["answers"][KIND]["right"]["value"] for one in rows if one["line"] == row["line"]]
    mean, answers = f"{row['ratio']:.3f}", f"{100 * row['answers'][KIND]['right']['value']:.1f}"
    if row["seeds"]:
        mean += f" ± {row['spread']['ratio']:.3f}"
        answers += f" ± {stdev(exact[: row['seeds']]):.1f}"
    return [mean, "" if label == "original" else f"{row['worst'][1]:.3f} {row['worst'][0]}", answers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for each model and part goes there")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--problems", type=int, default=1000, help="default: %(default)s")
    options = parser.parse_args()
    status = 0
    for part in options.only:
        for model in options.models:
            folder = options.out / f"{part}-{model}"
            problems = ("--kinds", KIND, "--problems", options.problems)
            status |= compare([model, "--out", str(folder), *map(str, (*PARTS[part], *problems))])
    print("", *first_table(options.out, options.models).markdown(numbers=True), sep="\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
