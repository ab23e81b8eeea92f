"""Whether a recipe is one for a model."""

from ..errors import RecipeError
from ..families import FAMILIES, MoeShape
from ..families.outline import Outline
from ..merging.members import GAMES
from ..merging.weightings import WEIGHTINGS
from ..recipe import AroundBase, Grouped, Narrow, Recipe, Residual, Smaller, Soft
from .device import on_device
from .sized import sized


def check_fit(recipe: Recipe, outline: Outline) -> Recipe:
    """Check a recipe against a model's numbers; returns it with these, and the device that its arithmetic runs on.

    Raises:
        RecipeError: naming the field, its value, and what this model, or this machine, allows.
    """
    check_game(recipe)
    if (weighting := recipe.merge.weights_by) not in (None, *WEIGHTINGS):
        raise RecipeError(
            f"recipe field 'weighting' is {weighting!r}, which no installed package registers; "
            f"accepted here: {', '.join(WEIGHTINGS)}"
        )
    shape = outline.shape
    recipe = on_device(sized(recipe, shape))
    if recipe.own_class and outline.family.patched_type is None:
        raise RecipeError(_without_class(recipe, outline))
    if isinstance(recipe.merge, Grouped):
        _check_grouped(recipe.merge, outline)
    if isinstance(recipe.merge, Smaller) and recipe.merge.width is not None:
        _check_width(recipe.merge, outline)
    if isinstance(recipe.merge, Soft):
        _check_soft(recipe.merge, shape)
    if isinstance(recipe.merge, AroundBase):
        _check_base(recipe.merge, outline)
    return recipe


def what_works(outline: Outline) -> str:
    """Options of ``namex patch`` that every model of the family takes: half of its routed parameters."""
    if outline.family.narrows:
        return "--keep 0.5"
    return f"--merge grouped --experts {max(outline.family.least, outline.shape.experts // 2)}"


def _without_class(recipe: Recipe, outline: Outline) -> str:
    """Why a recipe with a class of its own is refused, and what works."""
    able = ", ".join(sorted(name for name, family in FAMILIES.items() if family.patched_type))
    values = {"merge": recipe.merge.kind, **recipe.to_dict()}
    asked = next(n for n in ("merge", "routing", "budget") if values[n] not in ("grouped", "none", "linear", "equal"))
    return (
        f"recipe field '{asked}' is {values[asked]!r}, which needs a class of its own, and there is one for {able} "
        f"alone; what works for {outline.family.model_type}: {what_works(outline)}"
    )


def _check_grouped(merge: Grouped, outline: Outline) -> None:
    shape = outline.shape
    if not outline.family.least <= merge.experts <= shape.experts:
        raise RecipeError(
            f"recipe field 'experts' is {merge.experts}; this model has {shape.experts} a layer; "
            f"accepted: from {outline.family.least} to {shape.experts}"
        )
    if merge.target == "model" and not outline.family.linear:
        raise RecipeError(
            f"recipe field 'target' is 'model'; in {outline.family.model_type} a norm follows the experts, so that no "
            "output of theirs makes up for the layers below: accepted here: layer"
        )
    if merge.operator == "shared" and (not shape.shared_width or shape.shared_width % shape.width):
        raise RecipeError(
            f"recipe field 'operator' is 'shared'; the shared expert's width {shape.shared_width} is no multiple of "
            f"the routed width {shape.width}: the other control is random"
        )


def _check_width(merge: Smaller, outline: Outline) -> None:
    shape = outline.shape
    assert merge.width is not None
    asked = "merge 'narrow'" if isinstance(merge, Narrow) else "recipe field 'width'"
    if not outline.family.narrows:
        raise RecipeError(
            f"{asked} changes '{outline.family.width_field}', which sizes more than the routed experts of "
            f"{outline.family.model_type}; what works: {what_works(outline)}"
        )
    if merge.width >= shape.width:
        raise RecipeError(
            f"recipe field 'width' is {merge.width}; this model's routed experts have {shape.width} neurons; accepted: "
            f"from 1 to {shape.width - 1}"
        )


def _check_soft(merge: Soft, shape: MoeShape) -> None:
    if merge.top_k is not None and merge.top_k > shape.experts:
        raise RecipeError(f"recipe field 'top_k' is {merge.top_k}; this model has {shape.experts} experts a layer")
    rank, least = merge.curvature.rank, min(shape.hidden, shape.width)
    if rank is not None and rank >= least:
        raise RecipeError(f"recipe field 'rank' is {rank}; accepted here: from 1 below {least}")


def _check_base(merge: AroundBase, outline: Outline) -> None:
    base, shape = merge.base, outline.shape
    if base.index is not None and base.index >= shape.experts:
        raise RecipeError(f"recipe field 'base' is {base.base!r}; accepted here: index:0 to index:{shape.experts - 1}")
    if merge.has_base and base.base == "shared" and shape.shared_width % shape.width:
        raise RecipeError(
            f"recipe field 'base' is 'shared'; the shared expert's width {shape.shared_width} is no multiple of the "
            f"routed width {shape.width}: choose another base, first, mean or index:K"
        )
    if merge.first_layer == "sparse" and len(shape.layers) < 2:
        raise RecipeError(
            "recipe field 'first_layer' is 'sparse'; this model has one MoE layer, and nothing would be merged: "
            "accepted here: merged"
        )
    if isinstance(merge, Residual) and shape.renormalises:
        raise RecipeError(
            "merge 'residual' gives the base expert the mass that top-k leaves over; this model has norm_topk_prob = "
            f"true and leaves none; what works: {what_works(outline)}"
        )


def check_game(recipe: Recipe) -> None:
    """Raises:
    RecipeError: the recipe's game is an experiment's, which has not registered it.
    """
    metric = recipe.to_dict()["metric"]
    if metric not in GAMES:
        raise RecipeError(
            f"recipe field 'metric' is {metric!r}, the game over losses, which is an experiment: in a checkout "
            "of the sources use 'python experiments/loss_game/run.py patch' (or compare) with the same arguments; "
            f"accepted here: {', '.join(GAMES)}"
        )
