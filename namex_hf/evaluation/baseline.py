"""The baseline of a row: for a model with another router, the model with the same router and no merge."""

from collections.abc import Mapping
from typing import Any

from ..recipe import Recipe

DEFAULTS = Recipe().to_dict()
ROUTER = ("routing", "temperature")
TEXT = ("calibration_data", "calibration_tokens", "seed")
"""Fields of the text from which a router is computed, if it reads text."""

Stored = Mapping[str, Any]
"""A recipe as stored in configurations and reports."""


def router_of(recipe: Stored) -> dict[str, Any]:
    """The fields that determine the routing of tokens to experts."""
    whole = {**DEFAULTS, **recipe}
    reads = whole["routing"] == "stable" or whole["temperature"] == "entropy"
    return {name: whole[name] for name in (*ROUTER, *(TEXT if reads else ()))}


def is_baseline(other: Stored | None, recipe: Stored | None) -> bool:
    """Whether `other` has the router of `recipe` without a merge, and this router is not the model's own linear router.

    Args:
        other, recipe: None for an unpatched model.
    """
    if other is None or recipe is None or router_of(recipe)["routing"] == "linear":
        return False
    return is_unmerged(other) and not is_unmerged(recipe) and router_of(other) == router_of(recipe)


def is_unmerged(recipe: Stored) -> bool:
    """Whether all routed experts are the original's."""
    whole = {**DEFAULTS, **recipe}
    return whole["method"] == "smoe" and whole["merge"] != "narrow"
