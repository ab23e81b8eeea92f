"""A group of random experts with the text that it was seen with, and its second moments in numpy's float64."""

import numpy as np
import torch
from float64_reference import double
from small_mixtures import (
    PROJECTIONS,
    gates64,
    neurons64,
    random_routing,
    random_tokens,
    saliency64,
    usage64,
)
from torch.nn.functional import silu

from namex_hf.merging.combine import Combination
from namex_hf.merging.members import Members, Tuning, gather, merge_members
from namex_hf.merging.routing import Routing
from namex_hf.merging.weightings import Bargain, Seen

EXPERTS, TOKENS = 6, 120
INPUTS, ROUTING = random_tokens(TOKENS, 0), random_routing(TOKENS, EXPERTS, 2, 0)
RIDGE = 0.1
ALIGN, CURVATURE, POWER = (
    ("none", "weights", "activations"),
    ("identity", "diagonal", "calibrated"),
    ("equal", "usage", "loss"),
)


def group(experts, numbers=(4, 1, 2), align: str = "none", routing: Routing = ROUTING, inputs=INPUTS) -> Members:
    count = len(experts["gate_proj"])
    usage, saliency = usage64(routing, count), saliency64(INPUTS, routing, experts)
    seen = Seen(*(torch.from_numpy(amount[list(numbers)]) for amount in (usage, saliency)))
    return gather(experts, numbers, inputs, routing, silu, align, seen)


def tuning(weighting: str = "nash", point: str = "zero", **choices) -> Tuning:
    power = "usage" if choices.get("power") == "usage" else "equal"
    return Tuning(Combination(weighting, Bargain(point, power=power)), ridge=RIDGE, **choices)


def merge(members: Members, how: Tuning) -> dict[str, torch.Tensor]:
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
