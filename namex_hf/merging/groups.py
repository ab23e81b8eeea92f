"""A whole layer with fewer experts."""

from dataclasses import dataclass
from typing import Any

import torch

from .combine import Combination, average_rows, merge_group
from .experts import PROJECTIONS, Experts, grams
from .grouping import groups_by_weights
from .mass import expected_mass
from .record import cosines


@dataclass(frozen=True)
class MergedLayer:
    """What a layer becomes."""

    experts: list[dict[str, torch.Tensor]]  # K, by projection; a group of one is a view of its expert
    router: torch.Tensor  # [K, hidden]
    record: dict[str, Any]
    cosines: torch.Tensor  # float32 [1, N, N], between whole experts


def merge_layer(
    experts: Experts,
    router: torch.Tensor,
    norm: torch.Tensor,
    count: int,
    top_k: int,
    renormalises: bool,
    choice: Combination,
    seed: int,
) -> MergedLayer:
    """Cluster a layer's experts into ``count`` groups and make each group one expert.

    Args:
        router: ``[N, hidden]``; its rows are averaged within the groups.
        norm: ``[hidden]``, the weight of the norm before the router.
        top_k: of the original; the result's is min(top_k, count).

    Memory: the ``count`` merged experts.

    Raises:
        NotFiniteError: an expert holds NaN or infinity.
    """
    nothing = {name: torch.zeros(experts[name][0].shape) for name in PROJECTIONS}
    gram = grams(experts, nothing, "expert", choice.device)
    groups = groups_by_weights(gram[0], count)
    rows = average_rows(router, groups)
    factor = 1.0
    if not renormalises and count < len(router):
        before = expected_mass(router, norm, top_k, seed)
        factor = before / expected_mass(rows, norm, min(top_k, count), seed)
    merged, games = [], []
    for members in groups:
        expert, records = merge_group(experts, members, choice)
        if len(members) > 1 and factor != 1.0:
            expert["down_proj"] = (expert["down_proj"].float() * factor).to(expert["down_proj"].dtype)
        merged.append(expert)
        games += [{"members": list(members), **record} for record in records]
    record = {"groups": [list(members) for members in groups], "mass_factor": factor, "games": games}
    return MergedLayer(merged, rows, record, cosines(gram))
