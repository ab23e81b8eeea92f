"""A layer with fewer experts, without calibration text."""

from dataclasses import dataclass
from typing import Any

import torch

from ..recipe import Grouped
from .combine import Group, average_bias, averages, merged_expert, play
from .experts import Expert, Experts, grams
from .grouping import groups_by_weights
from .mass import expected_mass
from .moe_layer import MoELayer
from .record import cosines


@dataclass(frozen=True)
class MergedLayer:
    """A layer with fewer experts. They are merged on demand: only the experts of the original are held."""

    source: Experts
    groups: list[Group]
    merge: Grouped
    device: str
    factor: float  # on ``down_proj`` of groups of more than one
    router: torch.Tensor  # [K, hidden]
    bias: torch.Tensor | None  # of the gate, K numbers
    record: dict[str, Any]
    cosines: torch.Tensor  # float32 [1, N, N], between whole experts

    def expert(self, index: int) -> Expert:
        """The ``index``-th of the K experts."""
        return merged_expert(self.source, self.groups[index], self.merge, self.device, self.factor)


def merge_layer(layer: MoELayer, norm: torch.Tensor, merge: Grouped, seed: int, device: str = "cpu") -> MergedLayer:
    """Cluster a layer's experts into as many groups as the recipe has `experts`, and make each group one expert.

    Args:
        layer: the original. Router rows are averaged within the groups.
        norm: ``[hidden]``, what the norm before the router multiplies by.

    Memory: that of the games; experts are merged on demand.

    Raises:
        NotFiniteError: an expert holds NaN or infinity.
    """
    gram = grams(layer.experts, layer.experts.zeros(), "expert", device)
    count = merge.experts
    groups = groups_by_weights(gram[0], count)
    rows, bias = averages(layer.router, groups), average_bias(layer.bias, groups)
    factor = 1.0
    if not layer.gate.renormalises and count < len(layer.router):
        before = expected_mass(layer.router, norm, layer.gate, seed, layer.bias)
        factor = before / expected_mass(rows, norm, layer.gate.of(count), seed, bias)
    played = [play(layer.experts, members, merge, device) for members in groups]
    record = {
        "groups": [list(members) for members in groups],
        "mass_factor": factor,
        "games": [game for group in played for game in group.record],
    }
    return MergedLayer(layer.experts, played, merge, device, factor, rows, bias, record, cosines(gram))
