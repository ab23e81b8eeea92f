"""The merge of one group on calibration text: neurons aligned, members weighted, averaged under their curvature."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..recipe import Grouped
from .alignment import ALIGNMENT_TOKENS, order_by_activations, order_by_weights, permuted
from .combine import shares
from .curvature import CurvedSum, second_moment
from .experts import Expert, Experts, ExpertWeights, by_projection, grams, weighted_sum
from .record import game_records
from .routing import Activation, TokenRouting, neurons, on_tokens
from .weightings import ExpertStatistics


@dataclass(frozen=True)
class Members:
    """A group's experts, the most used first; the others have their neurons in its order."""

    numbers: tuple[int, ...]
    matrices: Expert  # of all of them, stacked, in the experts' dtype
    inputs: torch.Tensor  # float32 [tokens, hidden], of the layer
    routing: TokenRouting
    activation: Activation
    statistics: ExpertStatistics

    def expert(self, place: int) -> Expert:
        """A member's matrices in float32, where the inputs are."""
        return self.matrices.expert(place).to(self.inputs)

    def moment(self, place: int, name: str) -> torch.Tensor:
        """The second moment of the inputs of a member's matrix, from its own tokens, float32."""
        token, gate = self.routing.of(self.numbers[place])
        inputs = self.inputs[token]
        if name == "down_proj":
            inputs = on_tokens(neurons, inputs, self.matrices.expert(place), self.activation)
        return second_moment(inputs, gate)


def gather(
    experts: Experts,
    numbers: tuple[int, ...],
    inputs: torch.Tensor,
    routing: TokenRouting,
    activation: Activation,
    align: str,
    statistics: ExpertStatistics,
) -> Members:
    """Copies of a group's experts with their neurons in one order, that of the first.

    Args:
        statistics: of the group's experts, in the order of ``numbers``.

    Memory: a copy of the group in the experts' dtype.
    """
    reference = experts.expert(numbers[0]).to(inputs)
    own = torch.cat([routing.of(number)[0] for number in numbers])
    sample = inputs[own[:: max(1, len(own) // ALIGNMENT_TOKENS)]]
    matrices = experts.stacked(numbers)
    for place, number in enumerate(numbers[1:], start=1):
        expert = experts.expert(number).to(inputs)
        if align == "weights":
            order = order_by_weights(reference, expert)
        elif align == "activations" and len(sample):
            order = order_by_activations(reference, expert, sample, activation)
        else:
            continue
        matrices.set_expert(place, permuted(matrices.expert(place), order.cpu()))
    return Members(numbers, matrices, inputs, routing, activation, statistics)


def merge_members(members: Members, merge: Grouped) -> tuple[Expert, list[dict[str, Any]]]:
    """The one expert of a group, in the experts' dtype, and the record of its games.

    Memory: float64 sums of one matrix and one second moment.
    """
    weights, record = GAMES[merge.game.metric](members, merge)
    if merge.curvature.kind == "identity":
        matrices = members.matrices
        return ExpertWeights.of(lambda name: weighted_sum(matrices[name], weights[name]), matrices), record
    merged: dict[str, torch.Tensor] = {}
    for names in (("gate_proj", "up_proj"), ("down_proj",)):  # gate and up have the same inputs
        sums = {name: CurvedSum(merge.curvature.kind == "diagonal", merge.curvature.ridge) for name in names}
        for place in range(len(members.numbers)):
            expert, moment = members.expert(place), members.moment(place, names[0])
            for name in names:
                sums[name].add(float(weights[name][place]), expert[name], moment)
        merged |= {name: sums[name].solve().to(members.matrices[name]) for name in names}
    return ExpertWeights.of(merged.__getitem__, merged), record


GroupWeights = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
"""Weights ``[n]`` by projection, which sum to 1, and the record of their games."""


def by_weights(members: Members, merge: Grouped) -> GroupWeights:
    """The game over the members' matrices themselves: Gram matrices of the domain vectors around the first."""
    granularity, matrices = merge.game.granularity, members.matrices
    gram = grams(matrices, matrices.expert(0), granularity, members.inputs.device)
    weights = shares(gram, merge, matrices.dtype, members.statistics)
    return by_projection(weights.values, granularity), game_records(gram, weights, granularity)


GAMES: dict[str, Callable[[Members, Grouped], GroupWeights]] = {"euclidean": by_weights}
"""Functions for the shares of a group's members, by the recipe's ``metric``. An experiment adds its own here."""
