"""Answers over bytes: every model of a comparison as a point, in vectors that a page holds; nothing more is needed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, NamedTuple

from ..evaluation.compare import FLOOR, Comparison
from ..evaluation.rows import Row

TICKS = 6


class Point(NamedTuple):
    """A model in one form of its weights."""

    title: str
    weights: str
    megabytes: float
    exact: float  # per cent of the problems

    @property
    def label(self) -> str:
        name = f"{self.title}, {self.weights}" if self.weights else self.title
        return f"{name}: {self.exact:.1f} % in {self.megabytes:.2f} MB"


@dataclass(frozen=True)
class Axis:
    """From numbers to places between two ends of a picture."""

    low: float
    high: float
    begin: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], begin: float, end: float) -> "Axis":
        """With a margin around the values, in which labels have room."""
        margin = (max(values) - min(values)) / 7 or abs(values[0]) / 7 or 1
        return cls(min(values) - margin, max(values) + margin, begin, end)

    def place(self, value: float) -> float:
        return round(self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and names of round numbers."""
        rough = (self.high - self.low) / TICKS
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        numbers = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [(self.place(number * step), f"{number * step:g}") for number in numbers]


@dataclass(frozen=True)
class Frontier:
    """What the template ``frontier.html.jinja`` draws, in units of its own."""

    points: list[Point]
    width: ClassVar = 720
    left: ClassVar = 56
    right: ClassVar = 704
    top: ClassVar = 16
    bottom: ClassVar = 352
    height: ClassVar = 400
    colours: ClassVar = 6  # classes ``c0`` to ``c5`` of the page

    @property
    def x(self) -> Axis:
        return Axis.of([point.megabytes for point in self.points], self.left, self.right)

    @property
    def y(self) -> Axis:
        return Axis.of([point.exact for point in self.points], self.bottom, self.top)

    @property
    def titles(self) -> list[str]:
        """Of the models, each in one colour whatever its weights."""
        return list(dict.fromkeys(point.title for point in self.points))

    @property
    def pareto_front(self) -> list[Point]:
        """Those that no other one of as few bytes surpasses, by rising bytes."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda one: (one.megabytes, -one.exact)):
            if not found or point.exact > found[-1].exact:
                found.append(point)
        return found

    @property
    def steps(self) -> str:
        """The line along `pareto_front`, as an SVG path."""
        places = [(self.x.place(point.megabytes), self.y.place(point.exact)) for point in self.pareto_front]
        begin, *others = places
        return f"M{begin[0]} {begin[1]}" + "".join(f"H{x}V{y}" for x, y in others) + f"H{self.right}"

    def colour(self, title: str) -> str:
        """A class of the page."""
        return f"c{self.titles.index(title) % self.colours}"

    @property
    def description(self) -> str:
        """What the picture says, for those who do not see it."""
        return (
            f"{len(self.points)} models. Best of their bytes: {'; '.join(point.label for point in self.pareto_front)}."
        )


def frontier(comparison: Comparison) -> Frontier | None:
    """None where fewer than two models answered."""
    points = list(_points(comparison))
    return Frontier(points) if len(points) > 1 else None


def _points(comparison: Comparison) -> Iterator[Point]:
    """Of equal bytes, where they were measured; else a model each, and of several seeds the mean."""
    if comparison.sized:
        for one in comparison.sized:
            if (share := _share(one.row)) is not None:
                yield Point(one.row.title, one.weights, one.bytes / 1e6, 100 * share)
        return
    averaged = {(row.line, row.experts) for row in comparison.rows if row.seeds}
    for row in comparison.rows:
        size, alone = row.costs["bytes"], row.seeds is None and (row.line, row.experts) in averaged
        if (share := _share(row)) is not None and size and not alone and row.label != FLOOR:
            yield Point(row.title, "", size / 1e6, 100 * share)


def _share(row: Row) -> float | None:
    """Of problems answered exactly; where only other kinds were asked, the mean over these."""
    kinds = [measured["right"].value for measured in row.answers.values()]
    return fmean(kinds) if row.exact is None and kinds else row.exact
