"""The base expert's walk through the layers (paper eq. 3, 7 and 9), or a base of each layer's own (eq. 2)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .experts import Base, Experts, each_projection, games_of, grams, weighted_step
from .momentum import advance
from .record import cosines, game_record, own_base_record
from .weightings import WEIGHTINGS, Bargain, Weights


@dataclass(frozen=True)
class Propagation:
    """How the base expert moves from a layer to the next."""

    weighting: str | None = "nash"  # None: no step is made, the next layer has its own base (CAMEx)
    rules: Bargain = field(default_factory=Bargain)
    gamma: float = 1.0
    every: int | None = 1  # solve at every n-th MoE layer; None: at the first alone
    beta: complex = 0j  # of the momentum; 0 without
    device: str = "cpu"

    def solves_at(self, position: int) -> bool:
        """Whether weights are solved for at the ``position``-th MoE layer, or reused."""
        return position == 0 if self.every is None else position % self.every == 0


@dataclass(frozen=True)
class Walk:
    """What the base expert takes from a MoE layer to the next."""

    base: Base  # E_m, float32, unrounded
    weights: torch.Tensor | None = None  # float64 [games, N], of the layer where they were solved for last
    momentum: Mapping[str, torch.Tensor] = field(default_factory=dict)  # buffers, float32


@dataclass(frozen=True)
class Step:
    """One layer passed: on to the next, and what is written down."""

    walk: Walk | None  # None: the next layer begins with its own base
    record: list[dict[str, Any]]
    cosines: torch.Tensor  # float32 [games, N, N]


def propagate(experts: Experts, walk: Walk, choice: Propagation, position: int) -> Step:
    """E_m' = E_m + gamma * sum_i w_i (E_i - E_m), or by way of a momentum buffer (paper eq. 11).

    Without agreement the weights are zero: the base is carried on as it is, or as its momentum carries it. Without a
    weighting (CAMEx, paper eq. 2) the experts are looked at and nothing is carried on.

    Args:
        experts: the layer's, in their own dtype; read twice, once for the games and once for the step.
        walk: as the layer before left it. Its weights are reused, by expert index, where none are solved for. Expert
            indices of different layers do not correspond; the paper reuses them so.
        position: of the layer among the MoE layers.

    Memory: the step and the next base in float32, new momentum buffers, and a chunk of every expert.

    Raises:
        NotFiniteError: an expert holds NaN or infinity.
    """
    gram = grams(experts, walk.base, choice.rules.granularity, choice.device)
    games = games_of(choice.rules.granularity)
    if choice.weighting is None:
        return Step(None, [own_base_record(game, gram[index]) for index, game in enumerate(games)], cosines(gram))
    if walk.weights is None or choice.solves_at(position):
        precision = experts["gate_proj"][0].dtype
        weights = WEIGHTINGS[choice.weighting](gram, choice.rules, precision)
    else:
        count = len(gram)
        weights = Weights(walk.weights, ("reused",) * count, (None,) * count, (None,) * count)
    of_game = {name: weights.values[index] for index, game in enumerate(games) for name in game}
    step = each_projection(lambda name: weighted_step(experts[name], walk.base[name], of_game[name], choice.device))
    base, momentum = advance(walk.base, step, walk.momentum, choice.gamma, choice.beta)
    record = [game_record(game, gram[index], weights, index) for index, game in enumerate(games)]
    return Step(Walk(base, weights.values, momentum), record, cosines(gram))
