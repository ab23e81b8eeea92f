"""Experts by what they add to their tokens: mean of gate value times norm of the answer (REAP, Lasby et al. 2025)."""

import torch

from ...recipe import Game
from .weighting import Seen, Weights, by_share


def weighting(gram: torch.Tensor, game: Game, precision: torch.dtype, seen: Seen | None = None) -> Weights:
    """Shares of the players' saliencies; uniform where nobody has any.

    Raises:
        ValueError: no saliency is known.
    """
    if seen is None or seen.saliency is None:
        raise ValueError("weights by saliency need calibration text")
    return by_share(seen.saliency, len(gram), "saliency")
