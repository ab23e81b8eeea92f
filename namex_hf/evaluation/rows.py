"""From what was measured to the rows of a table: ratios to the original, intervals, means over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from .grid import Cell
from .statistics import Estimate, Groups, changes, estimate, mean_interval, mean_of

Result = Mapping[str, Any]
"""Of a cell, as `measure` gives it."""
Interval = tuple[float, float]
COSTS = ("bytes", "active", "prefill", "decode", "memory", "seconds", "peak_resident_bytes")


@dataclass(frozen=True)
class Row:
    """A model of the comparison, or the mean of several that differ in nothing but the seed."""

    label: str
    title: str
    line: str | None
    """What it shares with rows of the same recipe and another number of experts; None of a reference."""
    experts: int
    ratios: dict[str, float]
    """Perplexity by domain, over the original's."""
    ratio: float
    """Their geometric mean."""
    interval: Interval | None
    """Of `ratio`: 95 % bootstrap over windows, paired with the original's; None of the original, where a text has a
    single window, and of a mean."""
    exact: float | None
    """Share of problems answered exactly; None where none was asked."""
    difference: float | None
    """Of `exact`, to the original's."""
    difference_interval: Interval | None
    """95 % bootstrap over problems, paired."""
    costs: dict[str, float | None]
    """`COSTS`, as `measure` names them."""
    closeness: dict[str, Estimate] | None = None
    """``acceptance`` (a share) and ``divergence`` (nats a token), means over domains, to the original; None of the
    original, and where it was not asked for."""
    answers: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """By kind of problem: shares ``right``, ``cut`` and ``loops``, and the length in ``tokens``, each paired with the
    original's."""
    recipe: dict[str, Any] | None = None
    seeds: int | None = None
    """How many it is the mean of; None of a single model."""
    spread: dict[str, float] | None = None
    """Of a mean: sample standard deviations over seeds of ``ratio``, ``exact``, ``acceptance``, ``divergence`` and, by
    domain, the ratios."""
    unmerged: "Row | None" = None
    """The same model with the one of the same router and no merging in the original's place, where that was measured;
    None of a linear router."""
    unmerged_title: str | None = None
    """Of that model's row."""

    @property
    def worst(self) -> tuple[str, float]:
        """The domain that lost most, and its ratio."""
        domain = max(self.ratios, key=lambda name: self.ratios[name])
        return domain, self.ratios[domain]


def perplexities(result: Result) -> dict[str, float]:
    """Perplexity by domain, and their geometric mean under ``mean``."""
    domains = {name: math.exp(fmean(losses)) for name, losses in result["losses"].items()}
    return {**domains, "mean": math.exp(mean_of(list(result["losses"].values())))}


def row_of(
    label: str,
    result: Result,
    original: Result,
    cell: Cell | None = None,
    recipe: dict[str, Any] | None = None,
) -> Row:
    """The row of one model.

    Args:
        cell: of the grid; none of a reference.
        recipe: in full, as it was run.
    """
    names = list(result["losses"])
    losses, before = ([one["losses"][name] for name in names] for one in (result, original))
    differences, interval = changes(losses, before), None
    if result is not original and (in_nats := _interval(differences)):
        interval = math.exp(in_nats[0]), math.exp(in_nats[1])
    exact, difference, difference_interval = _exact(result, original)
    return Row(
        label=label,
        title=cell.title if cell else label,
        line=cell.line if cell else None,
        experts=result["experts"],
        ratios={name: math.exp(fmean(each)) for name, each in zip(names, differences, strict=True)},
        ratio=math.exp(mean_of(differences)),
        interval=interval,
        exact=exact,
        difference=difference,
        difference_interval=difference_interval,
        costs={name: result[name] for name in COSTS},
        closeness=_closeness(result["closeness"]),
        answers=_answers(result, original),
        recipe=recipe,
    )


def _closeness(found: Mapping[str, Mapping[str, Sequence[float]]] | None) -> dict[str, Estimate] | None:
    if found is None:
        return None
    equal = {"acceptance": 1.0, "divergence": 0.0}  # what the original has beside itself
    return {
        name: estimate(list(windows.values()), [[equal[name]] * len(each) for each in windows.values()])
        for name, windows in found.items()
    }


def _answers(result: Result, original: Result) -> dict[str, dict[str, Estimate]]:
    return {
        kind: {
            name: estimate([items], None if result is original else [original["answers"][kind][name]])
            for name, items in measured.items()
        }
        for kind, measured in result["answers"].items()
    }


def _mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """Over seeds, without an error over items."""
    return Estimate(fmean(one.value for one in estimates), _mean([one.difference for one in estimates]))


def _interval(differences: Groups) -> Interval | None:
    return mean_interval(differences) if min(map(len, differences)) > 1 else None


def _exact(result: Result, original: Result) -> tuple[float | None, float | None, Interval | None]:
    """The share of exact answers, its difference to the original's, and the interval of that."""
    right, before = result["right"], original["right"]
    if right is None or before is None:
        return None, None, None
    if result is original:
        return fmean(right), None, None
    differences = changes([right], [before])
    return fmean(right), mean_of(differences), _interval(differences)


def mean_row(rows: Sequence[Row], label: str, title: str) -> Row:
    """The mean of rows that differ in the seed: arithmetic means, and standard deviations over seeds.

    Args:
        rows: two or more.
        label, title: of the row.
    """
    first, unmerged = rows[0], [row.unmerged for row in rows if row.unmerged]
    spread = {name: stdev(row.ratios[name] for row in rows) for name in first.ratios}
    exact, difference = (_mean([getattr(row, name) for row in rows]) for name in ("exact", "difference"))
    spread["ratio"] = stdev(row.ratio for row in rows)
    close = [row.closeness for row in rows if row.closeness]
    closeness = None
    if close:
        spread |= {name: stdev(one[name].value for one in close) for name in close[0]}
        closeness = {name: _mean_estimate([one[name] for one in close]) for name in close[0]}
    if exact is not None:
        spread["exact"] = stdev(row.exact for row in rows if row.exact is not None)
    return Row(
        label=label,
        title=title,
        line=first.line,
        experts=first.experts,
        ratios={name: fmean(row.ratios[name] for row in rows) for name in first.ratios},
        ratio=fmean(row.ratio for row in rows),
        interval=None,
        exact=exact,
        difference=difference,
        difference_interval=None,
        costs={name: _mean([row.costs[name] for row in rows]) for name in COSTS},
        closeness=closeness,
        answers={
            kind: {name: _mean_estimate([row.answers[kind][name] for row in rows]) for name in measured}
            for kind, measured in first.answers.items()
        },
        seeds=len(rows),
        spread=spread,
        unmerged=mean_row(unmerged, label, title) if len(unmerged) == len(rows) else None,
        unmerged_title=first.unmerged_title,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def with_means(rows: Sequence[tuple[Cell, Row]]) -> list[Row]:
    """Rows by falling number of experts, else in their order; behind rows that differ in the seed alone, their mean."""
    order = sorted(rows, key=lambda pair: -pair[1].experts)
    families: dict[tuple[str, int], list[tuple[Cell, Row]]] = {}
    for cell, row in order:
        families.setdefault((cell.family, row.experts), []).append((cell, row))
    ordered = []
    for (family, _), members in families.items():
        ordered += [row for _, row in members]
        if len(members) > 1:
            cell, what = members[0][0], f"mean of {len(members)} seeds"
            ordered.append(mean_row([row for _, row in members], f"{family}, {what}", f"{cell.line}, {what}"))
    return ordered
