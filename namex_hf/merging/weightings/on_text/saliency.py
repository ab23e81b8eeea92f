"""Experts by what they add to their tokens: mean of gate value times norm of the output (REAP, Lasby et al. 2025)."""

from torch import Tensor, dtype

from ....recipe import Game
from ..weighting import ExpertStatistics, Weights, by_share


def weighting(gram: Tensor, game: Game, precision: dtype, statistics: ExpertStatistics | None = None) -> Weights:
    """Shares of the players' saliencies; uniform where all are 0.

    Raises:
        ValueError: no saliency is known.
    """
    if statistics is None or statistics.saliency is None:
        raise ValueError("weights by saliency need calibration text")
    return by_share(statistics.saliency, len(gram), "saliency")
