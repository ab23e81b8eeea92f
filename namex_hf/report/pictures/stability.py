"""Where the walk with momentum settles: the spectral radius over beta (what the paper's Figure 4 meant)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...bargaining.stability import largest_stable_step, spectral_radius
from ...recipe import AroundBase
from ..folder import PatchedFolder
from .picture import INK, Material, Picture, figure, plain

LEVELS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
SHADES = ("#08519c", "#2171b5", "#4292c6", "#6baed6", "#9ecae1", "#c6dbef", "#deebf7")
STAR: Mapping[str, Any] = {
    "linestyle": "none",
    "marker": "*",
    "markersize": 14,
    "markerfacecolor": "#e08214",
    "markeredgecolor": "white",
    "clip_on": False,
}
POINTS = 121  # along each axis


def picture(material: Material) -> Picture | None:
    """For the recipe's gamma; none where no base expert walks."""
    merge, layers = material.folder.recipe.merge, len(material.folder.shape.layers)
    if not isinstance(merge, AroundBase) or not merge.propagates:
        return None
    gamma, beta = merge.propagation.gamma, merge.propagation.complex_beta
    total = total_weight(material.folder)
    real, imaginary, radii = radii_over_beta(gamma, total)
    radius = round(spectral_radius(beta, gamma, total), 12)  # 0, not what rounding left of it
    drawn = figure(4.4)
    left, right = drawn.subplots(1, 2, width_ratios=[1, 1.35])
    _over_gamma(left, beta, gamma, total)
    shades = right.contourf(real, imaginary, radii, levels=LEVELS, colors=SHADES)
    right.contour(real, imaginary, radii, levels=[1.0], colors=[INK], linewidths=1.6)
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
    right.plot(circle.real, circle.imag, color="#8a8d91", linestyle="--", linewidth=1, label="|beta| = 1")
    both = [beta, beta.conjugate()] if beta.imag else [beta]
    named = "this recipe" + (" and its mirror image" if beta.imag else "")
    right.plot([one.real for one in both], [one.imag for one in both], label=named, **STAR)
    right.set_xlabel("Re beta")
    right.set_ylabel("Im beta")
    right.set_aspect("equal")
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    plain(right)
    drawn.colorbar(shades, ax=right, label="spectral radius a layer", pad=0.02, shrink=0.85)
    line = (
        f"Right, shaded: the momenta with which the walk settles at gamma {gamma:g}, the darker the sooner;"
        f" outside the thick line it grows. This recipe (star) has {radius:.3f} a layer, {radius**layers:.3g} over its"
        f" {layers} MoE layers. Left: the same with this recipe's beta and other steps; it settles for gamma below"
        f" {largest_stable_step(beta, total):.3g}. This is of the matrix of eq. 19 by its eigenvalues."
    )
    return Picture("5-stability", "Which momenta settle", line, drawn)


def _over_gamma(axes: Any, beta: complex, gamma: float, total: float) -> None:
    steps = np.linspace(0, 1.3 * max(gamma, largest_stable_step(beta, total)), 200)
    axes.plot(steps, [spectral_radius(beta, float(step), total) for step in steps], color=SHADES[1])
    axes.plot([gamma], [spectral_radius(beta, gamma, total)], **STAR)
    axes.axhline(1, color=INK, linewidth=1.6)
    axes.set_xlabel("gamma")
    axes.set_ylabel("spectral radius a layer")
    axes.set_ylim(0, 1.6)
    plain(axes)


def total_weight(folder: PatchedFolder) -> float:
    """Sum of a game's weights, the mean of all games: 1 on the simplex."""
    sums = [sum(game["weights"]) for record in folder.report.layers for game in record["games"] if game["weights"]]
    mean = sum(sums) / len(sums) if sums else 0.0
    return mean if mean > 0 else 1.0


def radii_over_beta(gamma: float, total: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Re beta ``[n]``, Im beta ``[n]``, spectral radius ``[n, n]``; mirrored, since beta and its conjugate are one."""
    line = np.linspace(-1.05, 1.05, POINTS)
    half = np.array([[spectral_radius(complex(r, i), gamma, total) for r in line] for i in line[: POINTS // 2 + 1]])
    return line, line, np.concatenate([half, half[-2::-1]])
