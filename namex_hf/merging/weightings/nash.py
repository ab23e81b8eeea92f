"""NAMEx: the Nash bargaining solution over domain vectors (paper Lemma 3.2)."""

import torch
from torch import Tensor

from ...bargaining import ccp_bargaining, nash_bargaining
from ...recipe import Game, GroupGame
from ...recipe.parts import CCP_ITERATIONS
from .weighting import ExpertStatistics, Weights


def weighting(gram: Tensor, game: Game, precision: torch.dtype, statistics: ExpertStatistics | None = None) -> Weights:
    """Solve K a = 1/a (zero disagreement point) or K a = 1/a + d (mean), one game a leading index.

    The mean point gives every player what the step of the plain mean gives it, d = K 1/N, in units where the mean of
    |tau|^2 is 1. The unit is a free choice that interpolates between the Nash step and the plain mean; the weights are
    returned in the units of ``gram``.

    Scale ``simplex`` divides a game's weights by their sum (paper C.3); ``lemma`` keeps the raw solution. The solver is
    exact (``newton``), or the paper's convex-concave procedure (``ccp``), which knows the zero point and equal power
    only. Power ``usage`` is the asymmetric bargain, K a = p/a + d with p the tokens that a player receives.

    Raises:
        MissingExtraError: ``ccp`` without its packages.
    """
    unit = gram.diagonal(dim1=-2, dim2=-1).mean(-1).sqrt()
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))[:, None]
    scaled = gram / unit[..., None] ** 2
    if game.solver == "ccp":
        solution = ccp_bargaining(scaled, game.ccp_iterations or CCP_ITERATIONS, precision)
    else:
        point = scaled.mean(-1) if game.disagreement == "mean" else None
        power = _power(game, statistics, gram)
        solution = nash_bargaining(scaled, disagreement=point, power=power, precision=precision)
    values = solution.weights / unit
    if game.scale == "simplex":
        total = values.sum(-1, keepdim=True)
        values = torch.where(total > 0, values / total, values)
    return Weights(
        values,
        tuple(solution.status),
        tuple(torch.as_tensor(solution.residual).flatten().tolist()),
        tuple(torch.as_tensor(solution.iterations).flatten().expand(len(gram)).tolist()),
    )


def _power(game: Game, statistics: ExpertStatistics | None, gram: torch.Tensor) -> torch.Tensor | None:
    if not isinstance(game, GroupGame) or game.power == "equal" or statistics is None or not statistics.usage.any():
        return None
    return (statistics.usage / statistics.usage.mean()).to(gram)
