"""One group of experts on the text that it was seen with: aligned, weighed, and made one under its curvature."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .alignment import ALIGNMENT_TOKENS, order_by_activations, order_by_weights, permuted
from .combine import Combination, shares
from .curvature import CurvedSum, second_moment
from .experts import PROJECTIONS, Experts, games_of, grams, weighted_sum
from .record import game_record
from .routing import Activation, Routing, neurons
from .weightings import Seen


@dataclass(frozen=True)
class Tuning:
    """How the members of a group become one, given text."""

    combination: Combination
    align: str = "activations"  # none, weights, activations
    curvature: str = "calibrated"  # identity, diagonal, calibrated
    metric: str = "euclidean"  # one of `GAMES`
    power: str = "equal"  # equal, usage; loss under ``metric: calibrated``
    ridge: float = 1e-2


@dataclass(frozen=True)
class Members:
    """A group's experts, the most used first, in the order of that one's neurons."""

    numbers: tuple[int, ...]
    matrices: dict[str, torch.Tensor]  # by projection [n, rows, columns], in the experts' dtype
    inputs: torch.Tensor  # float32 [tokens, hidden], the layer's
    routing: Routing
    activation: Activation
    seen: Seen

    def expert(self, place: int) -> dict[str, torch.Tensor]:
        """A member's matrices in float32, where the inputs are."""
        return {name: self.matrices[name][place].to(self.inputs) for name in PROJECTIONS}

    def moment(self, place: int, name: str) -> torch.Tensor:
        """The second moment of the inputs of a member's matrix, from its own tokens, float32."""
        token, gate = self.routing.of(self.numbers[place])
        inputs = self.inputs[token]
        if name == "down_proj":
            inputs = neurons(inputs, self.expert(place), self.activation)
        return second_moment(inputs, gate)


def gather(
    experts: Experts,
    numbers: tuple[int, ...],
    inputs: torch.Tensor,
    routing: Routing,
    activation: Activation,
    align: str,
    seen: Seen,
) -> Members:
    """Bring a group's experts into one order of neurons, that of the first.

    Args:
        seen: of the group's experts, in the order of ``numbers``.

    Memory: a copy of the group in the experts' dtype.
    """
    reference = {name: experts[name][numbers[0]].to(inputs) for name in PROJECTIONS}
    own = torch.cat([routing.of(number)[0] for number in numbers])
    sample = inputs[own[:: max(1, len(own) // ALIGNMENT_TOKENS)]]
    matrices = {name: torch.stack([experts[name][number] for number in numbers]) for name in PROJECTIONS}
    for place, number in enumerate(numbers[1:], start=1):
        expert = {name: experts[name][number].to(inputs) for name in PROJECTIONS}
        if align == "weights":
            order = order_by_weights(reference, expert)
        elif align == "activations" and len(sample):
            order = order_by_activations(reference, expert, sample, activation)
        else:
            continue
        for name, matrix in permuted({n: matrices[n][place] for n in PROJECTIONS}, order.cpu()).items():
            matrices[name][place] = matrix
    return Members(numbers, matrices, inputs, routing, activation, seen)


def merge_members(members: Members, tuning: Tuning) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The one expert of a group, in the experts' dtype, and what is written down about its games.

    Memory: float64 sums of one matrix and one second moment.
    """
    weights, record = GAMES[tuning.metric](members, tuning)
    if tuning.curvature == "identity":
        return {name: weighted_sum(members.matrices[name], weights[name]) for name in PROJECTIONS}, record
    merged: dict[str, torch.Tensor] = {}
    for names in (("gate_proj", "up_proj"), ("down_proj",)):  # gate and up see the same inputs
        sums = {name: CurvedSum(tuning.curvature == "diagonal", tuning.ridge) for name in names}
        for place in range(len(members.numbers)):
            expert, moment = members.expert(place), members.moment(place, names[0])
            for name in names:
                sums[name].add(float(weights[name][place]), expert[name], moment)
        merged |= {name: sums[name].solve().to(members.matrices[name]) for name in names}
    return merged, record


Weighed = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
"""Weights ``[n]`` by projection that sum to 1, and the record of the games they come from."""


def by_weights(members: Members, tuning: Tuning) -> Weighed:
    """The game over the members' weights as they are: Gram matrices of the domain vectors around the first."""
    rules, matrices = tuning.combination.rules, members.matrices
    first = {name: matrices[name][0] for name in PROJECTIONS}
    gram = grams(matrices, first, rules.granularity, tuning.combination.device)
    settled = shares(gram, tuning.combination, first["gate_proj"].dtype, members.seen)
    games = games_of(rules.granularity)
    record = [game_record(game, gram[index], settled, index) for index, game in enumerate(games)]
    return {name: settled.values[index] for index, game in enumerate(games) for name in game}, record


Game = Callable[[Members, Tuning], Weighed]
GAMES: dict[str, Game] = {"euclidean": by_weights}
"""How the shares of a group's members are settled, by the recipe's ``metric``. An experiment adds its own here."""
