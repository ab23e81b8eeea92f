"""What a weighting is: from the Gram matrices of the games to every player's share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...recipe import Game

FALLBACK = "uniform_fallback"
"""Status of a game without agreement in which all players weigh alike for that reason."""


@dataclass(frozen=True)
class Weights:
    """Shares of the players of one layer's games, and how they were found."""

    values: torch.Tensor  # float64 [games, N]
    status: tuple[str, ...]  # a game: 'agreement', 'no_agreement', `FALLBACK`, 'uniform', 'reused' ...
    residual: tuple[float | None, ...]  # relative, of the bargaining equation, where one was solved
    iterations: tuple[int | None, ...]


@dataclass(frozen=True)
class ExpertStatistics:
    """Statistics of a game's players, measured on calibration text."""

    usage: torch.Tensor  # float64 [N], tokens that each received
    saliency: torch.Tensor | None = None  # float64 [N], mean over them of gate value times norm of the output
    mass: torch.Tensor | None = None  # float64 [N], sum over them of gate values; None: not asked for
    peaks: torch.Tensor | None = None  # float64 [N], the largest entry of each expert's outputs, likewise

    def subset(self, numbers: Sequence[int]) -> "ExpertStatistics":
        chosen = list(numbers)
        return ExpertStatistics(self.usage[chosen], None if self.saliency is None else self.saliency[chosen])


class Weighting(Protocol):
    """A function of the Gram matrices, and of statistics of the players where there is text."""

    def __call__(
        self, gram: torch.Tensor, game: Game, precision: torch.dtype, statistics: ExpertStatistics | None = None
    ) -> Weights:
        """Weigh the players.

        Args:
            gram: float64 ``[games, N, N]``.
            precision: the dtype that the players' vectors were stored in.
            statistics: None without calibration text.
        """
        ...


def by_share(amount: torch.Tensor, games: int, status: str) -> Weights:
    """Every player's share of an amount, in all games alike; uniform where the amount is 0.

    Args:
        amount: ``[N]``, at least 0.
    """
    share = amount.double().cpu() if amount.any() else torch.ones(len(amount), dtype=torch.float64)
    return Weights((share / share.sum()).repeat(games, 1), (status,) * games, (None,) * games, (None,) * games)
