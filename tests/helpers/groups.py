"""A group of random experts with the text that it was seen with, and its second moments in numpy's float64."""

from contextlib import suppress
from itertools import product

import numpy as np
import torch
from torch.nn.functional import silu

from namex_hf.errors import RecipeError
from namex_hf.merging.experts import ExpertWeights
from namex_hf.merging.members import Members, gather, merge_members
from namex_hf.merging.routing import TokenRouting
from namex_hf.merging.weightings import ExpertStatistics
from namex_hf.recipe import Grouped, Recipe
from tests.helpers.checkpoints import PROJECTIONS
from tests.helpers.mixtures import random_routing, random_tokens
from tests.helpers.reference import double, gates64, neurons64, saliency64, usage64

EXPERTS, TOKENS = 6, 120
INPUTS, ROUTING = random_tokens(TOKENS, 0), random_routing(TOKENS, EXPERTS, 2, 0)
RIDGE = 0.1
ALIGN, CURVATURE, POWER = (
    ("none", "weights", "activations"),
    ("identity", "diagonal", "calibrated"),
    ("equal", "usage", "loss"),
)


def group(experts, numbers=(4, 1, 2), align: str = "none", routing: TokenRouting = ROUTING, inputs=INPUTS) -> Members:
    count = len(experts["gate_proj"])
    usage, saliency = usage64(routing, count), saliency64(INPUTS, routing, experts)
    statistics = ExpertStatistics(*(torch.from_numpy(amount[list(numbers)]) for amount in (usage, saliency)))
    return gather(experts, numbers, inputs, routing, silu, align, statistics)


def tuning(weighting: str = "nash", point: str = "zero", **choices) -> Grouped:
    """Of one expert, with a refitted down that takes a ridge whatever the curvature is."""
    fields = {"curvature": "calibrated", "align": "activations", "down": "refit", "ridge": RIDGE, **choices}
    if weighting == "nash":
        fields["disagreement"] = point
    return Recipe(merge="grouped", experts=1, weighting=weighting, **fields).merge


def every_way(**choices: tuple[str, ...]) -> list[Grouped]:
    """All ways that a recipe can state, each once."""
    found = {}
    for values in product(*choices.values()):
        with suppress(RecipeError):
            found[tuning(**dict(zip(choices, values, strict=True)))] = None
    return list(found)


def merge(members: Members, how: Grouped) -> ExpertWeights:
    return merge_members(members, how)[0]


def moments(members: Members) -> dict[str, list[np.ndarray]]:
    """By projection and member ``sum_t g_t^2 x_t x_t^T`` over its tokens, from dense gate values."""
    gates, result = gates64(members.routing, EXPERTS), {}
    for name in PROJECTIONS:
        result[name] = []
        for place, number in enumerate(members.numbers):
            one = {key: members.matrices[key][place] for key in PROJECTIONS}
            seen = neurons64(INPUTS, one) if name == "down_proj" else double(INPUTS)
            result[name].append(np.einsum("t,ti,tj->ij", gates[:, number] ** 2, seen, seen))
    return result
