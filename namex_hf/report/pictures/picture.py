"""What a picture is, and how all of them look."""

import base64
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ...files import write_bytes
from ..answers import Answers
from ..colours import COLOURS
from ..folder import PatchedFolder
from .hover import Spot, spots

INK = "#0b0d12"
"""Of text and axes. No data has this colour: in a vector picture it can be replaced by another ground's ink."""
PALE = "#e6e9ef"
"""The ink on a dark ground."""
MARKS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
DIVERGING = LinearSegmentedColormap.from_list(
    "below and above", ["#b35806", "#f1a340", "#f7f7f7", "#67a9cf", "#2166ac"]
)
"""Orange below, blue above."""
STYLE: Any = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.labelcolor": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.framealpha": 0.0,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,  # inches: room for ticks that change once they have their places
    "figure.constrained_layout.h_pad": 0.06,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "namex",
    "svg.fonttype": "path",
}
WIDTH = 9.0  # inches
DOTS = 144  # an inch, of PNG
IMAGE_DOTS = 100  # an inch, of images in vectors
COLUMNS = 6  # of panels


@dataclass(frozen=True)
class Material:
    """What there is to draw."""

    folder: PatchedFolder
    answers: Answers | None = None  # to calibration text; None where none was read
    distances: Mapping[str, list[float]] = field(default_factory=dict)  # by method; empty where no base expert moves
    layer: int | None = None  # asked for; None: the most telling one


@dataclass(frozen=True)
class Picture:
    """A figure, and the line that says what it shows and how to read it."""

    name: str  # of its files
    title: str
    line: str
    figure: Figure

    def svg(self, ink: str = INK, ground: str | None = None) -> bytes:
        """As vectors, on a transparent ground unless one is given."""
        drawn = self._vectors if ground is None else self._drawn_on(ground)
        return drawn.replace(INK.encode(), ink.encode())

    @cached_property
    def _vectors(self) -> bytes:
        return self._drawn_on("none")

    def _drawn_on(self, ground: str) -> bytes:
        return self._written(FigureCanvasSVG(self.figure).print_svg, ground, IMAGE_DOTS, metadata={"Date": None})

    def png(self) -> bytes:
        """As dots, on white."""
        return self._written(FigureCanvasAgg(self.figure).print_png, "white", DOTS)

    def data_of(self, ground: str) -> str:
        """As an address that holds the picture, in ink for a ``light`` or a ``dark`` ground."""
        content = self.svg(PALE if ground == "dark" else INK)
        return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"

    @property
    def values(self) -> list[Spot]:
        """For a page to show where the pointer is."""
        return spots(self.figure)

    def write(self, folder: Path) -> None:
        """As ``.png``, and as ``.svg`` on white."""
        write_bytes(folder / f"{self.name}.png", self.png())
        write_bytes(folder / f"{self.name}.svg", self.svg(ground="white"))

    def _written(self, write: Callable[..., None], ground: str, dots: int, **more: Any) -> bytes:
        """`Figure.savefig` draws twice, the first time for a layout, which is there already."""
        file = io.BytesIO()
        self.figure.set_facecolor(ground)
        self.figure.set_dpi(dots)
        with rc_context(STYLE):
            write(file, **more)
        return file.getvalue()


def figure(height: float) -> Figure:
    """An empty figure of the common width, in inches; not one of pyplot's."""
    return Figure(figsize=(WIDTH, height))


def line_style(index: int) -> dict[str, Any]:
    """Colour, dash and mark of a line; after a round of colours each comes with another dash and mark."""
    turned = index + index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[turned % len(DASHES)],
        "marker": MARKS[turned % len(MARKS)],
        "markersize": 4,
    }


def legend_below(axes: Axes, columns: int = 1) -> None:
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)


def tiles(count: int) -> tuple[int, int]:
    """Rows and columns for so many panels."""
    columns = min(count, COLUMNS)
    return math.ceil(count / columns), columns


def plain(axes: Axes) -> None:
    """No box, a light grid: for lines and dots."""
    axes.grid(True)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def from_zero(axes: Axes) -> None:
    """The y axis from 0 to a little above the data."""
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])


def layers_below(axes: Axes, layers: list[int]) -> None:
    """Layers along the x axis, not more labels than there is room for."""
    step = math.ceil(len(layers) / 12)
    axes.set_xticks(layers[::step], [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")


def limit(values: Any, least: float = 1e-3) -> float:
    """The largest modulus of what is finite, for a symmetric scale of colours."""
    finite = np.abs(np.asarray(values, dtype=float))
    finite = finite[np.isfinite(finite)]
    return max(least, float(finite.max())) if finite.size else least
