"""The numbers of a recipe that depend on the model: how many experts or neurons stay, and how much text is read."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

from ..errors import UsageError
from ..families import MoeShape
from ..files import size_text
from ..recipe import Grouped, Narrow, Recipe
from ..recipe.parts import TOKENS

MULTIPLES = (128, 64, 32, 16, 8, 4)
"""Of widths, the best first: programs that quantise or split matrices take multiples alone."""
LOST = 0.03
"""How far below the share that was asked for a width may be, for the sake of a multiple."""
TOKENS_A_NEURON = 32
"""Calibration tokens that an expert should receive for each of its neurons."""
ENOUGH_EQUATIONS = 16
"""For each number of a fit of whole layers; with half as many a fit brings nothing (docs/merging.md, How much text)."""
FITTED_MATRICES = 3
"""Of an expert: gate, up and down."""


def sized(recipe: Recipe, shape: MoeShape) -> Recipe:
    """The recipe for a model of this shape: a share is a number of experts, or a width, and tokens are a number."""
    merge = recipe.merge
    if isinstance(merge, Grouped) and merge.keep is not None:
        merge = replace(merge, keep=None, experts=max(1, int(merge.keep * shape.experts + 1e-9)))
    if isinstance(merge, Narrow):
        if merge.keep is not None:
            merge = replace(merge, keep=None, width=kept_width(merge.keep, shape.width))
        if recipe.calibration.tokens is None:
            calibration = replace(recipe.calibration, tokens=tokens_enough(merge, shape))
            return replace(recipe, merge=merge, calibration=calibration)
    return recipe if merge is recipe.merge else replace(recipe, merge=merge)


def kept_width(share: float, width: int) -> int:
    """The width under which no more than a share of an expert's neurons stays, from 1.

    Args:
        width: of the expert as it is.
    """
    most = share * width + 1e-9  # 0.29 x 100 is 28.999999999999996
    for multiple in MULTIPLES:
        if (one := int(most // multiple) * multiple) and one >= (1 - LOST) * most:
            return one
    return max(1, int(most))


def tokens_enough(merge: Narrow, shape: MoeShape) -> int:
    """How many tokens of calibration text narrower experts should see, `TOKENS` or more."""
    assert merge.width is not None
    each = TOKENS_A_NEURON * shape.width
    if merge.fit.kind == "layer":
        each = max(each, ENOUGH_EQUATIONS * FITTED_MATRICES * merge.width)
    return max(TOKENS, -(-each * shape.experts // shape.top_k))


def fitted_equations(tokens: int, shape: MoeShape, experts: int, width: int) -> float:
    """Equations for each number of a fit of whole layers, a token being one for each of its experts and outputs.

    Args:
        experts, width: of the result.
    """
    return tokens * min(shape.top_k, experts) / (FITTED_MATRICES * experts * width)


def width_of_size(bytes_out: Callable[[int], int], width: int, size: int, step: int = 1) -> int:
    """The largest width, by the rule of `kept_width`, under which a result has at most so many bytes.

    Args:
        bytes_out: bytes of the result by width, which grow with it.
        width: of the experts as they are.
        step: widths are multiples of it.

    Raises:
        UsageError: no width is small enough.
    """
    widths = range(step, width, step)
    found = bisect_right(widths, size, key=bytes_out)
    if not found:
        least, most = "one neuron" if step == 1 else f"{step} neurons", size_text(size)
        raise UsageError(f"--size {most}: with {least} an expert the result still has {size_text(bytes_out(step))}")
    return kept_width(widths[found - 1] / width, width)
