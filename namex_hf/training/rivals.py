"""The recipe of a rival: a model with another method, trained for comparison, otherwise as similar as possible."""

from typing import Any

from ..errors import RecipeError
from ..recipe import Recipe

FIXED = ("method", "routing", "temperature")
"""Fields that are never dropped: the rival's method, and the routing."""
STOCK = Recipe().to_dict()


def rival(recipe: Recipe, method: str) -> Recipe:
    """`recipe` under another method, without the fields that this method does not have.

    A field is reset to its default if a rule of recipes refuses it beside the fields in `FIXED`. If a rule names
    several fields, the last that is not at its default is reset. `weighting` is always reset: it would give the weights
    of the first method.
    """
    values = {**recipe.to_dict(), "method": method, "weighting": None}
    while True:
        try:
            return Recipe.from_dict(values)
        except RecipeError as error:
            free = [name for name in error.fields if name not in FIXED and values[name] != STOCK[name]]
            if not free:
                raise
            values[free[-1]] = STOCK[free[-1]]


def left_out(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    """The fields of `recipe`, with values, that `rival` reset in `other`."""
    values, others = recipe.to_dict(), other.to_dict()
    return {name: value for name, value in values.items() if name not in FIXED and value not in (None, others[name])}
