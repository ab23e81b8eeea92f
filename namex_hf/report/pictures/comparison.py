"""How much each recipe keeps, by the number of experts that stay. Needs matplotlib, the extra ``report``."""

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ...evaluation.compare import FLOOR, Comparison
from ...evaluation.rows import Row
from .picture import COLOURS, STYLE, Picture, figure, line_style, plain

STEEP = 3.0  # ratio between the largest and the smallest value from which on an axis is logarithmic
FAR = 2.0  # times the highest point: a floor above that is named and not drawn
GREY = COLOURS[-1]
LINES = 30  # of a legend that can still be read


def picture(comparison: Comparison) -> Picture | None:
    """A line a recipe, mean ratio left and worst domain right; of several seeds the mean alone. None without cells."""
    averaged = {(row.line, row.experts) for row in comparison.rows if row.seeds}
    lines: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if row.line is not None and (row.seeds or (row.line, row.experts) not in averaged):
            lines.setdefault(row.line, []).append(row)
    if not lines:
        return None
    floor = next((row for row in comparison.rows if row.label == FLOOR), None)
    with rc_context(STYLE):
        drawn = figure(3.8 + 0.12 * min(len(lines), LINES))
        mean, worst = drawn.subplots(1, 2)
        _panel(mean, lines, floor, of_worst=False)
        _panel(worst, lines, floor, of_worst=True)
        handles, labels = mean.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=2 if len(labels) > 3 else 1, fontsize=7)
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
    line = (
        "Perplexity as a ratio to the original's: 1 is the original, lower is better. Left the geometric mean over the "
        "texts, with 95 % bootstrap intervals (of means over seeds: ± their standard deviation); right the text that "
        "lost most."
    )
    return Picture("comparison", "What each recipe keeps", line, drawn)


def _panel(axes: Axes, lines: dict[str, list[Row]], floor: Row | None, of_worst: bool) -> None:
    values = []
    for index, (name, rows) in enumerate(lines.items()):
        ordered = sorted(rows, key=lambda row: row.experts)
        heights = [row.worst[1] if of_worst else row.ratio for row in ordered]
        values += heights
        axes.errorbar(
            [row.experts for row in ordered],
            heights,
            yerr=None if of_worst else _bars(ordered),
            **line_style(index),
            capsize=2,
            linewidth=1.2,
            label=name,
        )
    axes.axhline(1, color=GREY, linewidth=0.8)
    if floor is not None:
        height = floor.worst[1] if of_worst else floor.ratio
        if height <= FAR * max(values):
            axes.axhline(height, color=GREY, linewidth=0.8, linestyle=":")
            values.append(height)
        at = (0.99, height) if height in values else (0.99, 1.0)
        over = axes.get_yaxis_transform() if height in values else axes.transAxes
        text = f"{FLOOR}: {height:.2f}" + ("" if height in values else ", above")
        axes.text(*at, text, transform=over, ha="right", va="bottom", fontsize=7, color=GREY)
    if max(values) > STEEP * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(sorted({row.experts for rows in lines.values() for row in rows}))
    axes.set_xlabel("experts that stay in a layer")
    axes.set_ylabel("perplexity, ratio to the original's" + (", worst text" if of_worst else ""))
    plain(axes)


def _bars(rows: Sequence[Row]) -> list[list[float]]:
    """Below and above each point."""
    below, above = [], []
    for row in rows:
        if row.spread:
            low, high = row.ratio - row.spread["ratio"], row.ratio + row.spread["ratio"]
        else:
            low, high = row.interval or (row.ratio, row.ratio)
        below.append(max(0.0, row.ratio - low))
        above.append(max(0.0, high - row.ratio))
    return [below, above]
