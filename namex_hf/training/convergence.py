"""How far base experts still move while a model is trained (as Figure 5). Needs matplotlib, the extra ``report``."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from matplotlib import rc_context

from ..report.pictures.picture import COLOURS, DASHES, STYLE, Picture, figure, plain
from .scratch import ROWS, Schedule

Drift = Sequence[tuple[int, float]]
"""Of one run: the optimiser's step, and how far the bases have come since the last bargain, relative to their norm."""


def picture(drifts: Mapping[str, Sequence[Drift]], schedule: Schedule) -> Picture | None:
    """A line a row of Table 1, mean and deviation over seeds: as it is, and divided by the learning rate.

    Args:
        drifts: of each row, every seed's; all at the same steps.
    """
    if not drifts:
        return None
    colours = {method: COLOURS[index] for index, method in enumerate({ROWS[name].recipe.method: 0 for name in drifts})}
    with rc_context(STYLE):
        drawn = figure(3.6)
        for axes, divided in zip(drawn.subplots(1, 2), (False, True), strict=True):
            for name, runs in drifts.items():
                recipe = ROWS[name].recipe
                mean, spread = _over_seeds(runs, schedule if divided else None)
                steps = [step for step, _ in runs[0]]
                colour = colours[recipe.method]
                axes.plot(steps, mean, color=colour, linestyle=DASHES[recipe.momentum != "none"], label=name)
                low = [max(value - more, value / 10) for value, more in zip(mean, spread, strict=True)]
                high = [value + more for value, more in zip(mean, spread, strict=True)]
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set_yscale("log")
            axes.set_xlabel("optimiser step")
            axes.set_ylabel("distance" + (", divided by the learning rate" if divided else ", relative to the norm"))
            plain(axes)
        handles, labels = drawn.axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
    line = (
        f"L2 distance between a layer's base experts {schedule.bargain_every} steps apart, relative to their norm: the "
        "mean over layers but the first, its mean and standard deviation over seeds. Right: divided by the learning "
        "rate, which falls to nothing and takes every distance along."
    )
    return Picture("convergence", "How far base experts still move", line, drawn)


def _over_seeds(runs: Sequence[Drift], schedule: Schedule | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation at each step, divided by the schedule's learning rate where there is one."""
    mean, spread = [], []
    for point in zip(*runs, strict=True):
        values = [value / (schedule.learning_rate(step - 1) if schedule else 1) for step, value in point]
        mean.append(fmean(values))
        spread.append(stdev(values) if len(values) > 1 else 0.0)
    return mean, spread
