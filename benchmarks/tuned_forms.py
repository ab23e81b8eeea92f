"""The merges after fine-tuning, beside the sparse original tuned alike: ``python benchmarks/tuned_forms.py``.

Every row is one run of ``finetune/sft_smoltalk.py`` on the packaged chats with the settings of
``finetune/configs/tiny.yaml``: the merges ``residual``, ``soft`` by token (all layers, or the first one sparse) and
``soft`` by segment, each with four methods, and the original (``smoe``). There are three seeds for NAMEx-Full,
EP-CAMEx and the original, one for the others, and LoRA for NAMEx-Full and the original: 80 runs of minutes. Scores of a
finished run are kept below ``--out``: the same command goes on where it was stopped, and ``--table`` prints what is
there.

Ratios and differences are to the original of the same seed, model and adapter, over the same items.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from namex_hf.evaluation.statistics import difference, value
from namex_hf.evaluation.table import Table
from namex_hf.training.scores import Items
from namex_hf.training.tune import scores_of

ROOT = Path(__file__).parents[1]
FORMS: dict[str, dict[str, Any]] = {
    "residual": {},
    "by token": {"merge": "soft"},
    "by token, first layer sparse": {"merge": "soft", "first_layer": "sparse"},
    "by segment": {"merge": "soft", "routing_span": "all"},
}
SEVERAL = ("namex-full", "ep-camex", "smoe")
METHODS = ("namex-full", "ep-camex", "namex", "camex")
LORA = ["--use_peft", "true", "--train_kinds", "experts", "router", "attention", "--learning_rate", "1e-3"]


class Row(NamedTuple):
    """One run."""

    model: str
    form: str
    method: str
    lora: bool
    seed: int

    @property
    def name(self) -> str:
        return "-".join([self.model, self.form, self.method, "lora" if self.lora else "all", str(self.seed)])

    @property
    def original(self) -> "Row":
        """What it is compared with."""
        return self._replace(form="original", method="smoe")


def rows_of(models: list[str], forms: list[str], seeds: int) -> list[Row]:
    """All runs, those of the first seed first."""
    kinds = [("original", "smoe"), *product(forms, METHODS)]
    rows = [Row(model, *kind, False, seed) for seed, model, kind in product(range(seeds), models, kinds)]
    rows = [row for row in rows if row.seed == 0 or row.method in SEVERAL]
    return rows + [row._replace(lora=True) for row in rows if row.seed == 0 and row.method in ("smoe", "namex-full")]


def run(row: Row, out: Path) -> None:
    """Train, keep the scores, and remove the model."""
    folder, recipe = out / "now", out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"method": row.method, **FORMS.get(row.form, {})}))
    settings = yaml.safe_load((ROOT / "finetune" / "configs" / "tiny.yaml").read_text())
    settings |= {"model_name_or_path": row.model, "recipe": str(recipe), "seed": row.seed, "save_steps": 1000}
    del settings["compare"]
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / "finetune" / "sft_smoltalk.py"), "--config", str(config)]
    command += ["--output_dir", str(folder), "--overwrite", "true", *(LORA if row.lora else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{row.name}: {done.stderr[-2000:]}")
    (out / f"{row.name}.json").write_text(json.dumps(scores_of(folder)))
    shutil.rmtree(folder)


def read(row: Row, out: Path) -> dict[str, Items] | None:
    file = out / f"{row.name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def mean_of(numbers: list[float]) -> str:
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.2f}{spread}"


def table_of(rows: list[Row], out: Path, model: str) -> Table:
    """Before and after; with several seeds the mean and the standard deviation over them."""
    table = Table(["", "seeds", "chats", "text", "problems, %", "text, times", "problems, points"], [])
    kinds = dict.fromkeys((row.form, row.method, row.lora) for row in rows if row.model == model)
    for form, method, lora in kinds:
        found = []
        for row in rows:
            if (row.model, row.form, row.method, row.lora) == (model, form, method, lora):
                scores, original = read(row, out), read(row.original, out)
                if scores and original:
                    found.append((scores, original))
        if not found:
            continue
        cells = []
        for name in ("chats", "text", "problems"):
            before, after = ([value(name, scores[when][name]) for scores, _ in found] for when in ("before", "after"))
            cells.append(f"{statistics.fmean(before):.2f} -> {mean_of(after)}")
        for name in ("text", "problems"):
            apart = [difference(name, scores["after"][name], other["after"][name]) for scores, other in found]
            one = apart[0]
            interval = f" ({one['low']:.2f} to {one['high']:.2f})" if len(apart) == 1 else ""
            cells.append(mean_of([each["value"] for each in apart]) + interval)
        table.rows.append([f"{form}, {method}" + ", LoRA" * lora, str(len(found)), *cells])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/tuned_forms"), help="of the scores (default: %(default)s)"
    )
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-deepseek"], metavar="MODEL")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="print what is finished, and run nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = rows_of(options.models, options.forms, options.seeds)
    console = Console(width=140)
    for number, row in enumerate(rows, start=1):
        if not options.table and read(row, options.out) is None:
            with console.status(f"run {number} of {len(rows)}: {row.name}"):
                run(row, options.out)
    for model in options.models:
        title = f"{model}: before -> after, and after beside the original tuned alike"
        print("", title, "", *table_of(rows, options.out, model).markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
