"""Widths near the one that a recipe asks for, and which programs take them (docs/quantising.md)."""

from collections.abc import Iterator

from ..evaluation.table import Table
from ..patching.plan import Plan

QUANTISED = ((256, "all, K-quants too"), (32, "Q8_0, Q5_0, Q4_0"))
"""Rows of ``down_proj`` that llama.cpp quantises, by what their length is a multiple of; others it leaves in 16 bit."""
PROCESSES = (2, 4, 8)
BLOCK = 128
"""Of FP8 weights."""
NEAR = 0.15
"""How far from the width of the recipe others are listed, as a share of the original's."""


def width_table(plan: Plan) -> Table:
    """A row for each width of interest, the recipe's own marked."""
    asked, whole = plan.width, plan.shape.width
    rows = [
        [
            f"{width}{' (this run)' if width == asked else ''}",
            f"{width / whole:.1%}",
            next((types for multiple, types in QUANTISED if width % multiple == 0), "none: 16 bit"),
            _sizes(width, 1) or "none",
            _sizes(width, BLOCK) or ("one device" if width % BLOCK == 0 else "none"),
        ]
        for width in sorted({asked, *_near(asked, whole)})
    ]
    return Table(["width", "stays", "GGUF types of down_proj", "tensor parallel", "FP8 blocks, tensor parallel"], rows)


def _near(asked: int, whole: int) -> Iterator[int]:
    """The nearest multiples of 32 to 256 on both sides."""
    for multiple in (32, 64, 128, 256):
        for width in (asked // multiple * multiple, -(-asked // multiple) * multiple):
            if 0 < width < whole and abs(width - asked) <= NEAR * whole:
                yield width


def _sizes(width: int, block: int) -> str:
    """Numbers of processes whose parts are whole blocks."""
    return ", ".join(str(number) for number in PROCESSES if width % (number * block) == 0)
