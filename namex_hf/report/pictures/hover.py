"""The values of a picture, each with the place over the picture where a page shows it."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FuncFormatter

MOST = 4000  # values of a picture: each is a line of the page
REACH = 5.0  # points around a mark that show its value
HIDDEN = "_"  # begins the name of a line that a legend leaves out
UNNAMED = "_child"  # what matplotlib calls a line that was given none


class Spot(NamedTuple):
    """A rectangle in per cent of the picture's width and height, from its left and its top, and what is said there."""

    left: float
    top: float
    width: float
    height: float
    text: str


def spots(figure: Figure) -> list[Spot]:
    """Of every mark, bar and cell in a figure that has its layout; none where there are more than a page can hold."""
    placed: list[Spot] = []
    for axes in figure.axes:
        if axes.get_visible() and axes.name == "rectilinear":
            for box, text in (*_marks(axes, REACH / 72 * figure.dpi), *_bars(axes), *_cells(axes)):
                placed.append(_spot(figure, np.asarray(box), text))
                if len(placed) > MOST:
                    return []
    return placed


def _spot(figure: Figure, box: np.ndarray, text: str) -> Spot:
    """Of two opposite corners ``[2, 2]`` in dots."""
    (left, low), (right, high) = np.sort(100 * box / figure.bbox.size, axis=0)
    x, y, width, height = (round(float(one), 2) for one in (left, 100 - high, right - left, high - low))
    return Spot(x, y, width, height, text)


def _marks(axes: Axes, reach: float) -> Iterator[tuple[Any, str]]:
    """Of lines with marks; so many dots around one of them."""
    names = {bars.lines[0]: str(bars.get_label()) for bars in axes.containers if isinstance(bars, ErrorbarContainer)}
    for line in axes.lines:
        if line.get_marker() in ("None", "none", "", " "):
            continue
        name = names.get(line) or str(line.get_label())
        name = axes.get_ylabel().replace("\n", " ") if name.startswith(UNNAMED) else name.removeprefix(HIDDEN)
        for x, y in np.asarray(line.get_xydata(), dtype=float):
            if math.isfinite(x) and math.isfinite(y):
                place = axes.transData.transform((x, y))
                yield (place - reach, place + reach), f"{name}: {_along_x(axes, x)}, {y:.4g}"


def _bars(axes: Axes) -> Iterator[tuple[Any, str]]:
    for bars in axes.containers:
        if isinstance(bars, BarContainer):
            for bar in bars.patches:
                x, height = bar.get_x() + bar.get_width() / 2, bar.get_height()
                ends = ((bar.get_x(), 0.0), (bar.get_x() + bar.get_width(), height))
                yield axes.transData.transform(ends), f"{bars.get_label()}: {_along_x(axes, round(x))}, {height:.4g}"


def _cells(axes: Axes) -> Iterator[tuple[Any, str]]:
    title = axes.get_title() or _title_above(axes)
    for image in axes.images:
        values = np.ma.filled(np.ma.asarray(image.get_array()).astype(float), np.nan)
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                box = axes.transData.transform(((column - 0.5, row - 0.5), (column + 0.5, row + 0.5)))
                place = f"{_along_x(axes, column)}, {_along_y(axes, row)}: {value:.3g}"
                yield box, f"{title}: {place}" if title else place


def _title_above(axes: Axes) -> str:
    """That of the column, which its top panel alone bears."""
    panel = axes.get_subplotspec()
    others = ((one.get_title(), one.get_subplotspec()) for one in axes.get_shared_x_axes().get_siblings(axes))
    return next((title for title, at in others if title and panel and at and at.colspan == panel.colspan), "")


def _along_x(axes: Axes, value: float) -> str:
    return _place(axes.get_shared_x_axes().get_siblings(axes), "xaxis", value)


def _along_y(axes: Axes, value: float) -> str:
    return _place(axes.get_shared_y_axes().get_siblings(axes), "yaxis", value)


def _place(sharing: list[Any], which: str, value: float) -> str:
    """A value by the name of its tick, or with that of its axis. A layer or an expert is a whole number, wherever its
    mark was moved to be seen beside others."""
    axes = [getattr(one, which) for one in sharing]
    name = next((axis.get_label_text() for axis in axes if axis.get_label_text()), "")
    at = ""
    if isinstance(axes[0].get_major_formatter(), FixedFormatter | FuncFormatter):
        names = (tick.get_text() for tick in axes[0].get_majorticklabels())
        at = next((text for x, text in zip(axes[0].get_majorticklocs(), names, strict=False) if x == value), "")
    if not name:
        return at or f"{value:g}"
    return f"{name} {at or format(round(value) if name.startswith(('layer', 'expert')) else value, '.4g')}"
