"""The recipe: every choice that makes a patched model."""

from .choices import WEIGHTINGS
from .merges import AroundBase, Merge, Nothing, Residual, Soft
from .parts import BaseExpert, Calibration, Curvature, Fit, Game, GroupGame, Propagation, Routing
from .recipe import FIELDS, Recipe, read_yaml, refusals
from .smaller import Grouped, Narrow, Smaller

__all__ = [
    "FIELDS",
    "WEIGHTINGS",
    "AroundBase",
    "BaseExpert",
    "Calibration",
    "Curvature",
    "Fit",
    "Game",
    "GroupGame",
    "Grouped",
    "Merge",
    "Narrow",
    "Nothing",
    "Propagation",
    "Recipe",
    "Residual",
    "Routing",
    "Smaller",
    "Soft",
    "read_yaml",
    "refusals",
]
