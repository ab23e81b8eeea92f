"""The paper's ablations on the packaged models: ``python benchmarks/ablations.py [--quick]``.

    solver         the convex-concave procedure of 2 to 60 iterations beside the exact solution   (paper Table 8)
    every          weights solved for in every n-th MoE layer and reused between                  (paper Table 6)
    momentum       none, real, complex, quaternion, for three methods                             (paper Tables 5, 7)
    disagreement   zero, or the step of the plain mean                                            (paper Tables 4, 17)
    gamma          the step of the base expert                                                    (paper Figure 10)

Each table sets its rows against one of them, on the same text: `change` is the difference in perplexity (geometric mean
over the held-out texts) with one standard error of that paired difference, taken over windows of 512 tokens; `exact`
the held-out word problems answered exactly, and in brackets how many were won and lost. The difference of two counts
has a standard error of the root of won + lost. What lies within two standard errors was not measured to differ.

`residual` and `soft` by segment are the merges. `soft` without calibration answers no problem, so only its perplexity
is taken. All of it takes seven minutes of one core, `--quick` two. The solver's table needs the extra `ccp`.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from methods import patched
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

from namex_hf import Recipe
from namex_hf.bargaining import NashSolution, ccp_bargaining, domain_gram, nash_bargaining, spectral_radius
from namex_hf.checkpoint.resolve import local_folder
from namex_hf.errors import MissingExtraError
from namex_hf.evaluation.arithmetic import exact_answers, held_out_problems
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.perplexity import held_out_texts, perplexity
from namex_hf.evaluation.table import Table
from namex_hf.recipe import AroundBase

WINDOW = 512
METHODS = {"ep-camex": "EP-CAMEx", "namex": "NAMEx", "namex-full": "NAMEx-Full"}
MOMENTA: dict[str, dict[str, str]] = {
    "none": {},
    "0.9": {"momentum": "complex", "beta": "0.9"},
    "0.9, pi/12": {"momentum": "complex", "beta": f"0.9,{math.pi / 12}"},
    "0.9, pi/6": {"momentum": "complex", "beta": f"0.9,{math.pi / 6}"},
    "0.8 + 0.3 (i + j + k)": {"momentum": "quaternion", "beta": "0.8,0.3,0.3,0.3"},
}
Fields = dict[str, str | float | int]


@dataclass(frozen=True)
class Scores:
    """What one model makes of the held-out text."""

    losses: Tensor  # nats a token, [texts, windows]
    right: list[bool] | None  # a problem; none where none was asked

    @property
    def perplexity(self) -> str:
        return f"{float(self.losses.mean().exp()):.3f}"

    def change(self, other: Scores) -> str:
        """Against another, in per cent, with one standard error of the paired difference; windows vary within texts."""
        if other is self:
            return ""
        difference = self.losses - other.losses
        error = float((difference.var(1) / difference.shape[1]).sum().sqrt()) / len(difference)
        return f"{100 * math.expm1(float(difference.mean())):+.3f} ± {100 * error:.3f} %"

    def exact(self, other: Scores) -> str:
        assert self.right is not None
        assert other.right is not None
        if other is self:
            return str(sum(self.right))
        pairs = list(zip(self.right, other.right, strict=True))
        return f"{sum(self.right)} (+{pairs.count((True, False))} -{pairs.count((False, True))})"


class Bench:
    """A packaged model and what it is scored on. A recipe that several tables share is scored once."""

    def __init__(self, name: str, windows: int, problems: int | None):
        folder = local_folder(name)
        assert folder is not None
        self.name, self.original, self.tokenizer = name, load(folder), AutoTokenizer.from_pretrained(folder)
        self.problems = held_out_problems()[:problems]
        self.texts = [self._windows(text, windows) for text in held_out_texts().values()]
        self._known: dict[str, Scores] = {}

    def _windows(self, text: str, count: int) -> Tensor:
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
        return ids[: count * WINDOW].view(count, WINDOW)

    @property
    def layers(self) -> int:
        """MoE layers."""
        return sum(hasattr(layer.mlp, "experts") for layer in self.original.model.layers)

    def scores(self, **fields: str | float | int) -> Scores:
        key = Recipe.from_dict(fields).to_yaml()
        if key not in self._known:
            model = patched(**fields)(copy.deepcopy(self.original))
            losses = [[math.log(perplexity(model, ids, WINDOW)) for ids in text] for text in self.texts]
            right = None
            if "merge" not in fields:
                right = exact_answers(model, self.tokenizer, self.problems)
            self._known[key] = Scores(torch.tensor(losses, dtype=torch.float64), right)
        return self._known[key]

    def games(self, base: str) -> list[Tensor]:
        """Gram matrices, float64 [3, N, N] a MoE layer, of the walk that the exact solution takes."""
        model = patched(base=base)(copy.deepcopy(self.original))
        found = []
        for layer in model.model.layers:
            if not hasattr(layer.mlp, "experts"):
                continue
            experts, own = layer.mlp.experts, layer.mlp.base_expert
            gates, ups = experts.gate_up_proj.detach().chunk(2, dim=1)
            pairs = ((gates, own.gate_proj), (ups, own.up_proj), (experts.down_proj.detach(), own.down_proj))
            found.append(torch.stack([domain_gram(ours, linear.weight.detach()) for ours, linear in pairs]))
        return found


def shares(solution: NashSolution) -> Tensor:
    return solution.weights / solution.weights.sum(-1, keepdim=True)


def solved(games: list[Tensor], solve: Callable[[Tensor], NashSolution], repeats: int) -> tuple[NashSolution, float]:
    """All games of a model, a call a layer as a patch makes it; the median of the seconds."""
    seconds, parts = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        parts = [solve(layer) for layer in games]
        seconds.append(time.perf_counter() - start)
    together = NashSolution(
        weights=torch.cat([part.weights for part in parts]),
        residual=torch.cat([part.residual for part in parts]),
        iterations=torch.cat([part.iterations for part in parts]),
        status=[word for part in parts for word in part.status],
    )
    return together, statistics.median(seconds)


def solver_table(bench: Bench, base: str) -> Table:
    errors = ("worst residual", "largest weight error")
    table = Table(["iterations", "taken", "perplexity", "change", "exact", *errors, "seconds"], [])
    games = bench.games(base)
    exact, seconds = solved(games, partial(nash_bargaining, precision=torch.float32), 21)
    players = exact.weights > 0
    first: Fields = {"merge": "residual", "base": base}
    reference = bench.scores(**first)

    def row(label: str, found: NashSolution, scores: Scores, took: float) -> None:
        away = (shares(found) / shares(exact) - 1)[players].abs().max()
        numbers = (f"{float(found.residual.max()):.1e}", "" if found is exact else f"{float(away):.1e}", f"{took:.4f}")
        taken = f"{int(found.iterations.min())} to {int(found.iterations.max())}"
        against = scores.change(reference), scores.exact(reference)
        table.rows.append([label, taken, scores.perplexity, *against, *numbers])

    row("exact", exact, reference, seconds)
    for budget in (2, 5, 20, 40, 60):
        solve = partial(ccp_bargaining, iterations=budget, precision=torch.float32)
        found, seconds = solved(games, solve, 3)
        row(str(budget), found, bench.scores(**first, solver="ccp", ccp_iterations=budget), seconds)
    return table


def compared(
    bench: Bench, base: str, heads: Iterable[str], rows: Iterable[tuple[tuple[str, ...], Fields, Fields]]
) -> Table:
    """One row a recipe, both merges side by side, each against the recipe that comes with it."""
    measured = ("residual", "change", "exact", "soft", "change")
    table = Table([*heads, *measured], [])
    for labels, fields, reference in rows:
        cells = list(labels)
        for merge in ({}, {"merge": "soft", "routing_span": "all"}):
            scores = bench.scores(**fields, **merge, base=base)
            against = bench.scores(**reference, **merge, base=base)
            cells += [scores.perplexity, scores.change(against)]
            if not merge:
                cells.append(scores.exact(against))
        table.rows.append(cells)
    return table


def every_table(bench: Bench, base: str) -> Table:
    rows: list[tuple[tuple[str, ...], Fields, Fields]] = [((str(n),), {"every": n}, {}) for n in (1, 2, 5)]
    rows.append(((f"L = {bench.layers} (NAMEx)",), {"method": "namex"}, {}))
    rows.append((("never (EP-CAMEx)",), {"method": "ep-camex"}, {}))
    return compared(bench, base, ("every",), rows)


def momentum_table(bench: Bench, base: str) -> Table:
    rows: list[tuple[tuple[str, ...], Fields, Fields]] = []
    for method, name in METHODS.items():
        for label, momentum in MOMENTA.items():
            fields: Fields = {"method": method, **momentum}
            merge = Recipe.from_dict(fields).merge
            assert isinstance(merge, AroundBase)
            radius = spectral_radius(merge.propagation.complex_beta, gamma=1.0)
            labels = (name, label, f"{radius:.3f}", f"{radius**bench.layers:.3f}")
            rows.append((labels, fields, {"method": method}))
    return compared(bench, base, ("method", "beta", "rho(R)", "rho^L"), rows)


def disagreement_table(bench: Bench, base: str) -> Table:
    rows: list[tuple[tuple[str, ...], Fields, Fields]] = [
        ((point,), {"disagreement": point}, {}) for point in ("zero", "mean")
    ]
    return compared(bench, base, ("point",), rows)


def gamma_table(bench: Bench, base: str) -> Table:
    rows: list[tuple[tuple[str, ...], Fields, Fields]] = [
        ((METHODS[method], str(gamma)), {"method": method, "gamma": gamma}, {"method": method})
        for method in ("ep-camex", "namex-full")
        for gamma in (0.5, 1.0, 2.0)
    ]
    return compared(bench, base, ("method", "gamma"), rows)


TABLES: dict[str, Callable[[Bench, str], Table]] = {
    "solver": solver_table,
    "every": every_table,
    "momentum": momentum_table,
    "disagreement": disagreement_table,
    "gamma": gamma_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["tiny", "tiny-deepseek"]
    parser.add_argument(
        "--models", nargs="+", default=names, choices=names, metavar="MODEL", help=f"of {', '.join(names)}; all"
    )
    parser.add_argument(
        "--tables", nargs="+", default=list(TABLES), choices=TABLES, metavar="TABLE", help="of those above; all"
    )
    parser.add_argument(
        "--base",
        nargs="+",
        default=["shared"],
        choices=("shared", "first"),
        help="base expert of the first MoE layer; the solver's table shows both (default: shared)",
    )
    parser.add_argument("--quick", action="store_true", help="2 of 8 windows a text, 32 of 200 problems")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    windows, problems = (2, 32) if options.quick else (8, None)
    console = Console(width=160)
    for name in options.models:
        bench = Bench(name, windows, problems)
        tokens, count = windows * WINDOW, len(bench.problems)
        print(f"{name}: perplexity on the first {tokens} tokens of each held-out text; exact, of {count}")
        for which in options.tables:
            for base in ("shared", "first") if which == "solver" else options.base:
                try:
                    with console.status(f"{name}: {which}, base {base}"):
                        table = TABLES[which](bench, base)
                except MissingExtraError as error:
                    parser.exit(2, f"{error}\n")
                print("", f"{name}, {which}, base {base}", "", *table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
