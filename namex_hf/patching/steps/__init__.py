"""What a recipe does to a layer. A step is one file here that defines ``STEP``, and is named by `Recipe.steps`."""

from importlib import import_module

from ...recipe import Recipe
from .step import Step


def steps_of(recipe: Recipe) -> list[Step]:
    """The steps of a recipe, in their order."""
    return [import_module(f".{name}", __name__).STEP(recipe) for name in recipe.steps]
