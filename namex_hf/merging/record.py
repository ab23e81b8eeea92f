"""The record of a merge: plain values that follow from Gram matrices and weights alone."""

import math
from typing import Any

import torch

from ..bargaining import cosine
from .experts import games_of
from .weightings import Weights

KEYS = (
    *("projections", "weights", "status", "residual", "newton_steps", "spread"),
    *("norms", "step_norm", "cosine_to_mean"),
)
"""Of a game's record, in this order."""


def game_records(grams: torch.Tensor, weights: Weights | None, granularity: str) -> list[dict[str, Any]]:
    """The games of one layer, as plain values.

    Args:
        grams: float64 ``[games, N, N]`` of the games' domain vectors.
        weights: None where the layer keeps its own base, so that there is no game and no step.
    """
    records = []
    for index, (game, gram) in enumerate(zip(games_of(granularity), grams, strict=True)):
        norms = gram.diagonal().sqrt().tolist()
        records.append(dict.fromkeys(KEYS) | {"projections": list(game), "status": "own_base", "norms": norms})
        if weights is not None:
            records[-1] |= _solution(gram, weights, index)
    return records


def _solution(gram: torch.Tensor, weights: Weights, index: int) -> dict[str, Any]:
    values = weights.values[index]
    active = values[values > 0]
    return {
        "weights": values.tolist(),
        "status": weights.status[index],
        "residual": weights.residual[index],
        "newton_steps": weights.iterations[index],
        "spread": float(active.std(correction=0) / active.mean()) if len(active) else 0.0,
        "step_norm": math.sqrt(max(0.0, float(values @ gram @ values))),
        "cosine_to_mean": cosine_to_mean(gram, values),
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
