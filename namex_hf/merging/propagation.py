"""The base expert's walk through the layers (paper eq. 3, 7 and 9)."""

from dataclasses import dataclass
from typing import Any

import torch

from .experts import PROJECTIONS, Base, Experts, games_of, grams, weighted_step
from .record import cosines, game_record
from .weightings import WEIGHTINGS, Weights


@dataclass(frozen=True)
class Propagation:
    """How the base expert moves from a layer to the next."""

    weighting: str = "nash"
    disagreement: str = "zero"
    granularity: str = "matrix"
    scale: str = "simplex"
    gamma: float = 1.0
    every: int | None = 1  # solve at every n-th MoE layer; None: at the first alone
    device: str = "cpu"

    def solves_at(self, position: int) -> bool:
        """Whether weights are solved for at the ``position``-th MoE layer, or reused."""
        return position == 0 if self.every is None else position % self.every == 0


@dataclass(frozen=True)
class Step:
    """One layer passed: the base of the next, the weights used, and the record."""

    next_base: dict[str, torch.Tensor]
    weights: torch.Tensor  # float64 [games, N]
    record: list[dict[str, Any]]
    cosines: torch.Tensor  # float32 [games, N, N]


def propagate(
    experts: Experts, base: Base, choice: Propagation, position: int, reused: torch.Tensor | None = None
) -> Step:
    """E_m' = E_m + gamma * sum_i w_i (E_i - E_m).

    Without agreement the weights are zero and the base is carried on as it is.

    Args:
        experts: the layer's, in their own dtype; read twice, once for the games and once for the step.
        base: E_m of this layer, float32, unrounded.
        position: of the layer among the MoE layers.
        reused: weights of an earlier layer, by expert index, for where none are solved for. Expert indices of
            different layers do not correspond; the paper reuses them so.

    Memory: the next base in float32, and a chunk of every expert.

    Raises:
        NotFiniteError: an expert holds NaN or infinity.
    """
    gram = grams(experts, base, choice.granularity, choice.device)
    if reused is None or choice.solves_at(position):
        precision = experts["gate_proj"][0].dtype
        weights = WEIGHTINGS[choice.weighting](gram, choice.disagreement, choice.scale, precision)
    else:
        count = len(gram)
        weights = Weights(reused, ("reused",) * count, (None,) * count, (None,) * count)
    next_base, games = {}, games_of(choice.granularity)
    for index, game in enumerate(games):
        for name in game:
            step = weighted_step(experts[name], base[name], weights.values[index], choice.device)
            next_base[name] = base[name] + choice.gamma * step
    record = [game_record(game, gram[index], weights, index) for index, game in enumerate(games)]
    return Step({name: next_base[name] for name in PROJECTIONS}, weights.values, record, cosines(gram))
