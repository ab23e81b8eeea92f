"""What a weighting is: from the Gram matrices of the games to every player's share."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Weights:
    """Shares of the players of one layer's games, and what the weighting has to say for them."""

    values: torch.Tensor  # float64 [games, N]
    status: tuple[str, ...]  # a game: 'agreement', 'no_agreement', or 'uniform'
    residual: tuple[float | None, ...]  # relative, of the bargaining equation, where one was solved
    iterations: tuple[int | None, ...]


@dataclass(frozen=True)
class Bargain:
    """The rules of a game."""

    disagreement: str = "zero"
    scale: str = "simplex"
    granularity: str = "matrix"
    solver: str = "newton"
    ccp_iterations: int = 2
    power: str = "equal"  # bargaining power of a player: equal, or usage


class Weighting(Protocol):
    """A function of the Gram matrices, and of how much the players are used where that is known."""

    def __call__(
        self, gram: torch.Tensor, rules: Bargain, precision: torch.dtype, usage: torch.Tensor | None = None
    ) -> Weights:
        """Weigh the players.

        Args:
            gram: float64 ``[games, N, N]``.
            precision: the dtype that the players' vectors were stored in.
            usage: float64 ``[N]``, tokens that each received on calibration text; None without such text.
        """
        ...
