"""Experts by how much they are used: tokens received on calibration text."""

import torch

from ...recipe import Game
from .weighting import Seen, Weights, by_share


def weighting(gram: torch.Tensor, game: Game, precision: torch.dtype, seen: Seen | None = None) -> Weights:
    """Shares of the tokens that the players receive; uniform where nobody receives any.

    Raises:
        ValueError: no usage is known.
    """
    if seen is None:
        raise ValueError("weights by usage need calibration text")
    return by_share(seen.usage, len(gram), "usage")
