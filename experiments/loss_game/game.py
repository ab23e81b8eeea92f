"""The game over losses in a group's merge: what ``metric: calibrated`` and its ``power`` values of a recipe mean."""

from typing import Any

import torch
from losses import LossSolution, loss_bargaining

from namex_hf.merging.experts import PROJECTIONS
from namex_hf.merging.members import GAMES, GroupWeights, Members
from namex_hf.recipe import Grouped


def register() -> None:
    """From here on this process plays the game where a recipe asks for it."""
    GAMES["calibrated"] = by_losses


def by_losses(members: Members, merge: Grouped) -> GroupWeights:
    """The bargain over the errors that the members' own tokens would see, a game a matrix.

    Without agreement all weigh alike, recorded as such. With the zero point the first member is what everybody has
    without agreement; it can gain nothing, so it has no stake, and keeps the weight that it has in a plain mean (as in
    `combine.shares`).
    """
    count = len(members.numbers)
    weights, record = {}, []
    for name in PROJECTIONS:
        matrices = [members.expert(place)[name] for place in range(count)]
        moments = [members.moment(place, name) for place in range(count)]
        zero = merge.game.disagreement == "zero"
        point = matrices[0] if zero else torch.stack(matrices).mean(0)
        power = torch.ones(count, dtype=torch.float64)
        if merge.game.power == "usage":
            power = members.statistics.usage
        elif merge.game.power == "loss":
            losses = [curved_loss(point, *pair) for pair in zip(matrices, moments, strict=True)]
            power = torch.tensor(losses, dtype=torch.float64)
        found = loss_bargaining(matrices, moments, point, power, merge.curvature.ridge)
        share = torch.full((count,), 1 / count, dtype=torch.float64)
        if found.status == "agreement":
            share = found.weights.cpu() / found.weights.sum().cpu()
            if zero:
                share = share * (count - 1) / count
                share[0] += 1 / count
        weights[name] = share
        record.append(loss_record(name, found, share))
    return weights, record


def curved_loss(matrix: torch.Tensor, expert: torch.Tensor, moment: torch.Tensor) -> float:
    """``tr((W - E_i) C_i (W - E_i)^T)``: the squared error on an expert's tokens where W answers in its place.

    Never negative, as a moment that was rounded may have it.
    """
    difference = (matrix - expert).double()
    return max(0.0, float(((difference @ moment.double()) * difference).sum()))


def loss_record(name: str, found: LossSolution, weights: torch.Tensor) -> dict[str, Any]:
    """The record of a bargain over losses. Norms and steps are losses there: of every player, at the disagreement
    point and at the solution.

    Args:
        weights: float64 ``[n]``, as they were used.
    """
    return {
        "projections": [name],
        "weights": weights.tolist(),
        "status": found.status,
        "residual": found.residual,
        "newton_steps": found.iterations,
        "spread": float(weights.std(correction=0) / weights.mean()),
        "losses_before": found.losses_before.tolist(),
        "losses_after": found.losses_after.tolist(),
    }
