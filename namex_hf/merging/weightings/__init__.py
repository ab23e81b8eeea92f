"""Weightings by name: a file here, or in ``on_text``, that defines ``weighting`` is one; others are registered."""

from importlib import import_module

from ...errors import UsageError
from ...recipe.choices import WEIGHTINGS as NEED_TEXT
from .weighting import FALLBACK, ExpertStatistics, Weighting, Weights

WEIGHTINGS: dict[str, Weighting] = {
    name: import_module(f"{__name__}.{'on_text.' * reads}{name}").weighting for name, reads in NEED_TEXT.items()
}

__all__ = ["FALLBACK", "WEIGHTINGS", "ExpertStatistics", "Weighting", "Weights", "register_weighting"]


def register_weighting(name: str, function: Weighting, needs_text: bool = False) -> None:
    """Add a weighting of another package: recipes may name it from now on.

    A package that has an entry point of the group ``namex_hf.weightings``, a module that calls this, need not be
    imported by its users.

    Args:
        needs_text: whether it reads `ExpertStatistics`, so that a recipe with it reads calibration text.

    Raises:
        UsageError: the name is taken.
    """
    if name in WEIGHTINGS:
        raise UsageError(f"weighting '{name}' is there already; accepted: a name beside {', '.join(WEIGHTINGS)}")
    WEIGHTINGS[name], NEED_TEXT[name] = function, needs_text
