"""Lines of ``namex-patch`` on what a recipe means for a model: widths that programs do not take, too little text."""

from collections.abc import Iterator

from ..patching.config import GROUPED_MULTIPLE, IMPLEMENTATION, takes_grouped_products
from ..patching.plan import Plan
from ..patching.sized import ENOUGH_EQUATIONS, TOKENS_A_NEURON, fitted_equations
from ..recipe import Narrow
from ..resources import packaged_models


def width_line(plan: Plan) -> str | None:
    """What a width means that the grouped products of torch do not take."""
    if plan.width == plan.shape.width or takes_grouped_products(plan.width):
        return None
    return (
        f"width {plan.width} is no multiple of {GROUPED_MULTIPLE}, which grouped products of bfloat16 need: "
        f"config.json asks for {IMPLEMENTATION} 'eager', which is slower"
    )


def tokens_lines(plan: Plan) -> Iterator[str]:
    """How much of the text a routed expert receives, where that matters."""
    if plan.recipe.merge.rewrites and plan.reads_text:
        yield f"text: a routed expert receives {_tokens(plan)}"


def _tokens(plan: Plan) -> str:
    tokens, width = plan.tokens * plan.shape.top_k / plan.shape.experts, plan.shape.width
    stay = f", {tokens / plan.width:.1f} for each that stays" if plan.width < width else ""
    return f"{tokens:,.0f} tokens on average, {tokens / width:.1f} for each of its {width} neurons{stay}"


def text_lines(plan: Plan) -> Iterator[str]:
    """What is wrong with the calibration text of a recipe that rewrites experts."""
    recipe, shape = plan.recipe, plan.shape
    if not (recipe.merge.rewrites and plan.reads_text):
        return
    if recipe.calibration.data == "packaged" and plan.checkpoint.name not in packaged_models():
        yield (
            "warning: the packaged text is what the packaged models were trained on; for this model give text of the "
            "kind that it is used for (--calibration-data FILE, FOLDER or a Hub data set)"
        )
    if plan.fits == "layer":
        equations = fitted_equations(plan.tokens, shape, plan.experts, plan.width)
        if equations < ENOUGH_EQUATIONS:
            enough = plan.tokens * ENOUGH_EQUATIONS / equations
            yield (
                f"warning: {plan.tokens:,} tokens are {equations:.1f} equations for each number that is fitted; below "
                f"{ENOUGH_EQUATIONS} a fit may bring nothing: about {enough:,.0f} tokens are needed"
            )
    if isinstance(recipe.merge, Narrow) and plan.tokens * shape.top_k < TOKENS_A_NEURON * shape.experts * shape.width:
        yield f"warning: little text, {_tokens(plan)}; {TOKENS_A_NEURON} for each are enough"
