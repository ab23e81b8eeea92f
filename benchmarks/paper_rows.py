"""What the recipes of the paper's Tables 4 and 10 do to the packaged models: ``python benchmarks/paper_rows.py``.

Every file of ``patches/MODEL`` that keeps the sparse experts is applied to the packaged model of the same family: model
x routing x method x disagreement. Perplexity of the packaged held-out text (geometric mean of the domains) and held-out
word problems answered exactly. Ratio and difference are to the same routing without merging (`smoe`), those of such a
row to the original; both with 95 % bootstrap intervals, over windows of text within each domain and over problems.
Pairs are resampled together.
"""

import argparse
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import AutoTokenizer

from namex_hf import Recipe, patch_model
from namex_hf.checkpoint.resolve import local_folder
from namex_hf.evaluation.arithmetic import exact_answers, held_out_problems
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.perplexity import held_out_texts, window_losses
from namex_hf.evaluation.statistics import mean_interval
from namex_hf.evaluation.table import Table

PATCHES = Path(__file__).parents[1] / "patches"
FAMILIES = {"tiny": "qwen1.5-moe-a2.7b", "tiny-deepseek": "deepseek-moe-16b"}
ROUTINGS, METHODS = ("linear", "cosine", "stable"), ("smoe", "ep-camex", "namex-full", "namex-full-mean")
WINDOW = 256  # shorter than elsewhere: more of them to draw from


class Scores(NamedTuple):
    """Of one model, sample by sample."""

    losses: list[list[float]]  # a domain: of every window, in nats a token
    right: list[bool]


def score(model: Any, tokenizer: Any, texts: Sequence[str], tokens: int, problems: Sequence[dict[str, str]]) -> Scores:
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0, :tokens]
        losses.append(window_losses(model, ids, WINDOW).tolist())
    return Scores(losses, exact_answers(model, tokenizer, problems))


def row(before: Scores, after: Scores) -> tuple[str, str, str, str, str]:
    """Perplexity, its ratio to that of `before` and interval, exact answers, their difference and interval."""
    change = [
        [new - old for new, old in zip(*pair, strict=True)] for pair in zip(after.losses, before.losses, strict=True)
    ]
    low, high = map(math.exp, mean_interval(change))
    difference = [float(new) - float(old) for new, old in zip(after.right, before.right, strict=True)]
    least, most = (100 * bound for bound in mean_interval([difference]))
    share = 100 * sum(after.right) / len(after.right)
    return (
        f"{math.exp(mean(after.losses)):.2f}",
        f"{math.exp(mean(change)):.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{share:.1f} %",
        f"{100 * sum(difference) / len(difference):+.1f} ({least:+.1f} to {most:+.1f})",
    )


def mean(groups: Sequence[Sequence[float]]) -> float:
    return sum(sum(group) / len(group) for group in groups) / len(groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=8192, help="of every held-out text (default: 8192)")
    parser.add_argument("--problems", type=int, help="word problems (default: all)")
    arguments = parser.parse_args()
    texts, problems = list(held_out_texts().values()), held_out_problems()[: arguments.problems]
    console = Console(width=150)
    for name in arguments.models:
        folder = local_folder(name)
        assert folder is not None
        original, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
        beside = {"original": score(original, tokenizer, texts, arguments.tokens, problems)}
        columns = ["routing", "method", "beside", "perplexity", "ratio", "95 %", "exact", "difference (95 %)"]
        table = Table(columns, [])
        for routing in ROUTINGS:
            for method in METHODS:
                file = PATCHES / FAMILIES[name] / f"{'' if routing == 'linear' else routing + '-'}{method}.yaml"
                with console.status(f"{name}: {file.stem}"):
                    model = patch_model(copy.deepcopy(original), Recipe.from_yaml(file), tokenizer)
                    after = score(model, tokenizer, texts, arguments.tokens, problems)
                other = "original" if method == "smoe" else f"{routing} smoe"
                beside.setdefault(f"{routing} smoe", after)
                table.rows.append([routing, method, other, *row(beside[other], after)])
        title = f"{name}, {arguments.tokens} tokens of each text, {len(problems)} problems"
        print("", title, "", *table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
