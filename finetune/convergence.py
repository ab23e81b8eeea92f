"""How far base experts still move while a model is trained (as Figure 5). Needs matplotlib, the extra ``report``."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from matplotlib import rc_context
from scratch import ROWS

from namex_hf.report.pictures.picture import COLOURS, DASHES, STYLE, Picture, figure, plain

Drift = Sequence[tuple[int, float]]
"""Of one run: the optimiser's step, and how far the bases have come since the last bargain, relative to their norm."""


def picture(drifts: Mapping[str, Sequence[Drift]], every: int) -> Picture | None:
    """A line a row of Table 1, mean and deviation over seeds: as it is, and over that of the first row.

    Args:
        drifts: of each row, every seed's; all at the same steps.
        every: steps from one bargain to the next.
    """
    if not drifts:
        return None
    first = next(iter(drifts))
    unit = _over_seeds(drifts[first], None)[0]
    colours = {method: COLOURS[index] for index, method in enumerate({ROWS[name].recipe.method: 0 for name in drifts})}
    with rc_context(STYLE):
        drawn = figure(3.6)
        left, right = drawn.subplots(1, 2)
        for axes, divisor in ((left, None), (right, unit)):
            for name, runs in drifts.items():
                recipe, (mean, spread) = ROWS[name].recipe, _over_seeds(runs, divisor)
                steps, look = [step for step, _ in runs[0]], {"color": colours[recipe.method]}
                axes.plot(steps, mean, linestyle=DASHES[recipe.momentum != "none"], label=name, **look)
                low = [value - more for value, more in zip(mean, spread, strict=True)]
                high = [value + more for value, more in zip(mean, spread, strict=True)]
                axes.fill_between(steps, low, high, alpha=0.15, linewidth=0, **look)
            axes.set_xlabel("optimiser step")
            plain(axes)
        left.set_yscale("log")
        left.set_ylabel("distance, relative to the norm")
        right.set_ylabel(f"over that of {first}")
        drawn.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
    line = (
        f"L2 distance between a layer's base experts {every} steps apart, relative to their norm: the mean over layers "
        "but the first, its mean and standard deviation over seeds. The learning rate falls to nothing and takes every "
        f"distance along; right, over the mean distance of {first} at the same step."
    )
    return Picture("convergence", "How far base experts still move", line, drawn)


def _over_seeds(runs: Sequence[Drift], divisor: Sequence[float] | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation at each step, of what is divided by one number a step."""
    mean, spread = [], []
    for place, point in enumerate(zip(*runs, strict=True)):
        values = [value / (divisor[place] if divisor else 1) for _, value in point]
        mean.append(fmean(values))
        spread.append(stdev(values) if len(values) > 1 else 0.0)
    return mean, spread
