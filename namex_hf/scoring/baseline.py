"""Which model a row is compared with: one that routes otherwise, with the model of the same router and no merging."""

from collections.abc import Mapping
from typing import Any

from ..recipe import Recipe

DEFAULTS = Recipe().to_dict()
ROUTER = ("routing", "temperature")
TEXT = ("calibration_data", "calibration_tokens", "seed")
"""Fields of the text that the router is made on, where it reads any."""

Stored = Mapping[str, Any]
"""A recipe as configurations and reports hold it."""


def router_of(recipe: Stored) -> dict[str, Any]:
    """The fields that settle how tokens find experts."""
    whole = {**DEFAULTS, **recipe}
    reads = whole["routing"] == "stable" or whole["temperature"] == "entropy"
    return {name: whole[name] for name in (*ROUTER, *(TEXT if reads else ()))}


def is_baseline(other: Stored | None, recipe: Stored | None) -> bool:
    """Whether `other` has the router of `recipe` and merges nothing, and the router is not the model's own linear one.

    Args:
        other, recipe: None of an unpatched model.
    """
    if other is None or recipe is None or router_of(recipe)["routing"] == "linear":
        return False
    merges = [{**DEFAULTS, **one}["method"] != "smoe" for one in (other, recipe)]
    return merges == [False, True] and router_of(other) == router_of(recipe)
