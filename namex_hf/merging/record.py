"""What is written down about a merge: everything here follows from Gram matrices and weights alone."""

import math
from typing import Any

import torch

from ..bargaining import cosine
from .weightings import Weights


def game_record(game: tuple[str, ...], gram: torch.Tensor, weights: Weights, index: int) -> dict[str, Any]:
    """One game of one layer, as plain values.

    Args:
        gram: float64 ``[N, N]`` of the game's domain vectors.
        index: of the game in ``weights``.
    """
    values = weights.values[index]
    active = values[values > 0]
    return {
        "projections": list(game),
        "weights": values.tolist(),
        "status": weights.status[index],
        "residual": weights.residual[index],
        "newton_steps": weights.iterations[index],
        "spread": float(active.std(correction=0) / active.mean()) if len(active) else 0.0,
        "norms": gram.diagonal().sqrt().tolist(),
        "step_norm": math.sqrt(max(0.0, float(values @ gram @ values))),
        "cosine_to_mean": cosine_to_mean(gram, values),
    }


def own_base_record(game: tuple[str, ...], gram: torch.Tensor) -> dict[str, Any]:
    """`game_record` of a layer that keeps its own base: no game was played, nothing has weights and no step is made."""
    return {
        "projections": list(game),
        "weights": None,
        "status": "own_base",
        "residual": None,
        "newton_steps": None,
        "spread": None,
        "norms": gram.diagonal().sqrt().tolist(),
        "step_norm": None,
        "cosine_to_mean": None,
    }


def cosine_to_mean(gram: torch.Tensor, weights: torch.Tensor) -> float | None:
    """Cosine between ``sum w_i tau_i`` and the step of the plain mean; none where either is no step at all."""
    uniform = torch.full_like(weights, 1 / len(weights))
    step, mean = float(weights @ gram @ weights), float(uniform @ gram @ uniform)
    if step <= 0 or mean <= 0:
        return None
    return float(weights @ gram @ uniform) / math.sqrt(step * mean)


def cosines(grams: torch.Tensor) -> torch.Tensor:
    """Cosines between the players of every game, float32 ``[games, N, N]``; 0 for one without stake."""
    return torch.stack([cosine(gram) for gram in grams]).float()
