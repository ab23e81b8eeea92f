"""Experts by how much they are used: tokens received on calibration text."""

from torch import Tensor, dtype

from ....recipe import Game
from ..weighting import ExpertStatistics, Weights, by_share


def weighting(gram: Tensor, game: Game, precision: dtype, statistics: ExpertStatistics | None = None) -> Weights:
    """Shares of the tokens that the players receive; uniform where no player receives any.

    Raises:
        ValueError: no usage is known.
    """
    if statistics is None:
        raise ValueError("weights by usage need calibration text")
    return by_share(statistics.usage, len(gram), "usage")
