"""EP-CAMEx: every expert the same share (paper eq. 3, with M_i = I)."""

import torch
from torch import Tensor

from ...recipe import Game
from .weighting import ExpertStatistics, Weights


def weighting(gram: Tensor, game: Game, precision: torch.dtype, statistics: ExpertStatistics | None = None) -> Weights:
    """1/N for each of the N experts, one that is the base itself included."""
    games, count = gram.shape[:2]
    values = torch.full((games, count), 1 / count, dtype=torch.float64)
    return Weights(values, ("uniform",) * games, (None,) * games, (None,) * games)
