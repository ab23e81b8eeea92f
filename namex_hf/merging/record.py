"""What is written down about a merge: everything here follows from Gram matrices and weights alone."""

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


def game_records(grams: torch.Tensor, weights: Weights, granularity: str) -> list[dict[str, Any]]:
    """The games of one layer, as plain values.

    Args:
        grams: float64 ``[games, N, N]`` of the games' domain vectors.
    """
    return [_game_record(game, grams[index], weights, index) for index, game in enumerate(games_of(granularity))]


def _game_record(game: tuple[str, ...], gram: torch.Tensor, weights: Weights, index: int) -> dict[str, Any]:
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


def own_base_records(grams: torch.Tensor, granularity: str) -> list[dict[str, Any]]:
    """`game_records` of a layer that keeps its own base: no game, no weights, no step."""
    return [
        dict.fromkeys(KEYS)
        | {"projections": list(game), "status": "own_base", "norms": gram.diagonal().sqrt().tolist()}
        for game, gram in zip(games_of(granularity), grams, strict=True)
    ]


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
