"""Experts by how much they are used: tokens received on calibration text."""

import torch

from .weighting import Bargain, Weights


def weighting(gram: torch.Tensor, rules: Bargain, precision: torch.dtype, usage: torch.Tensor | None = None) -> Weights:
    """Shares of the tokens that the players receive; uniform where nobody receives any.

    Raises:
        ValueError: no usage is known.
    """
    if usage is None:
        raise ValueError("weights by usage need calibration text")
    share = usage.double().cpu() if usage.any() else torch.ones(len(usage), dtype=torch.float64)
    games = len(gram)
    return Weights((share / share.sum()).repeat(games, 1), ("usage",) * games, (None,) * games, (None,) * games)
