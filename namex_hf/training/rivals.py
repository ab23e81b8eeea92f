"""The recipe of a model that is trained beside another: its method is a rival's, all else is alike where it can be."""

from typing import Any

from ..errors import RecipeError
from ..recipe import Recipe

KEPT = ("method", "routing", "temperature")
"""Fields that are never given up: the rival's method, and how tokens find experts."""
STOCK = Recipe().to_dict()


def rival(recipe: Recipe, method: str) -> Recipe:
    """`recipe` under another method, without the fields that this method does not have.

    A field goes where a rule of recipes refuses it beside those in `KEPT`; where a rule names several, the last one
    that is not the default's. What a fit or a curvature implies goes with them. `weighting` goes always: it would weigh
    as the first method does.
    """
    values = {**recipe.to_dict(), "method": method, "weighting": None}
    while True:
        try:
            return Recipe.from_dict(values)
        except RecipeError as error:
            free = [name for name in error.fields if name not in KEPT and values[name] != STOCK[name]]
            if not free:
                raise
            values[free[-1]] = STOCK[free[-1]]


def left_out(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    """The fields of `recipe` that `other`, made of it by `rival`, does not have, with their values."""
    mine, others = recipe.to_dict(), other.to_dict()
    return {name: value for name, value in mine.items() if name not in KEPT and value not in (None, others[name])}
