"""The exact Nash bargaining solution between experts, by Newton's method.

In Nguyen et al., Expert Merging in Sparse MoE with Nash Bargaining, experts bargain over the update of the base expert.
In Navon et al. 2022, Multi-Task Learning as a Bargaining Game, tasks bargain over a gradient step. Both maximise
sum_i p_i log(tau_i . Delta - d_i) over the update Delta. At the solution Delta = sum a_i tau_i up to scale, with

    K a = p / a + d,   a > 0,   K_ij = tau_i . tau_j,

where both papers set the bargaining power p = 1 and the disagreement point d = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import ScaledGames, checked_game
from .existence import Players, Tolerance, agreement_exists
from .newton import minimise

AGREEMENT = "agreement"
NO_AGREEMENT = "no_agreement"
#: Weights with a larger residual do not count as an agreement.
WORST_RESIDUAL = 1e-3


@dataclass(frozen=True)
class NashSolution:
    """Solution of K a = p / a + d for one game or a batch [...] of games of N players.

    Attributes:
        weights: float64 [..., N], the raw a (unit: 1 / length of a player's vector). 0 for players outside the game,
            and for all players without agreement.
        residual: float64 [...], the certificate: ``max_i |K a - p / a - d|_i / (p_i / a_i + |d_i|)`` over the players
            in the game. It does not depend on the players' scales. 1 without agreement, its limit as a goes to 0.
        iterations: int64 [...], the number of Newton steps; 0 where no player has a stake, or where the start already
            shows that there is no agreement.
        status: 'agreement' or 'no_agreement'; for a batch a flat list of these, in the row-major order of the leading
            axes.
    """

    weights: Tensor
    residual: Tensor
    iterations: Tensor
    status: str | list[str]


def nash_bargaining(
    gram: Tensor,
    disagreement: Tensor | None = None,
    power: Tensor | None = None,
    precision: torch.dtype | None = None,
) -> NashSolution:
    """Solve K a = p / a + d for a > 0.

    Args:
        gram: K, [..., N, N], symmetric positive semidefinite, any floating dtype, any device, any batch axes.
        disagreement: d, [..., N] or broadcast to it, in the Gram's unit (length squared times weight); 0 by default.
        power: p >= 0, [..., N] or broadcast to it; 1 by default. With d = 0 the update has the squared length sum p.
        precision: dtype of the players' vectors, which sets what counts as 0; by default the Gram's. Pass it:
            `domain_gram` gives a float64 Gram matrix also of bf16 experts.

    Two kinds of players are outside the game, with weight 0: those with no stake (a row of zeros, whatever their d) and
    those of power 0. The latter lose their veto too. This is the game of the other players, not the limit p_i -> 0,
    in which such a player could still demand a gain that is not negative.

    No agreement exists exactly when some v >= 0, v != 0 has K v = 0 and d . v >= 0. For d = 0 this means that 0 lies in
    the convex hull of the players, for instance when the base is the mean of the experts. That does not depend on the
    players' scales, so it is decided with every player scaled to length 1. The shortest convex combination counts as 0
    up to the rounding that `precision` explains (see `existence`). Weights are then 0: the caller does not change the
    base. `precision` does not cover the rounding of the base: a mean of nearly equal experts must be passed unrounded.

    Also 'no_agreement': a game that float64 cannot solve to a residual of 1e-3, such as one with powers of 1e-15 of the
    others'.

    Computed in float64 on the Gram's device (on the CPU where the device has no float64), not differentiable. The
    residual that float64 can attain is about 1e-16 / m, m the squared length of that shortest combination.

    Raises:
        ValueError: shapes that do not fit, entries that are not finite, a matrix that is not symmetric positive
            semidefinite, negative power, a precision that is not a floating dtype.
    """
    game = checked_game(gram, disagreement, power)
    tolerance = Tolerance.of(_checked_precision(precision, gram.dtype), gram.dtype)
    players = Players.of(game.matrix, game.linear, game.power, game.present)
    minimum = minimise(
        game.matrix, game.linear, game.power, lambda point, image: players.witness(point, image, tolerance)
    )
    agreed = _agreed(game, players, minimum.point, minimum.stopped, tolerance)
    residual = _residual(game, minimum.point)
    agreed &= residual <= WORST_RESIDUAL
    has_players = game.present.any(-1)
    weights = torch.where(game.present & agreed[:, None], minimum.point * game.unscale, 0.0)
    batch, count = gram.shape[:-2], gram.shape[-1]
    statuses = [AGREEMENT if exists else NO_AGREEMENT for exists in agreed.tolist()]
    return NashSolution(
        weights=weights.reshape(*batch, count).to(gram.device),
        residual=torch.where(agreed, residual, 1.0).reshape(batch).to(gram.device),
        iterations=torch.where(has_players, minimum.steps, 0).reshape(batch).to(gram.device),
        status=statuses if batch else statuses[0],
    )


def _checked_precision(precision: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if precision is None:
        return default
    if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
        raise ValueError(f"precision is {precision!r}; accepted is a floating torch.dtype, such as torch.bfloat16")
    return precision


def _agreed(game: ScaledGames, players: Players, point: Tensor, stopped: Tensor, tolerance: Tolerance) -> Tensor:
    """[B], True where an agreement exists: by the bound at the solution, or else by `agreement_exists`."""
    image = (game.matrix @ point[..., None])[..., 0]
    agreed = game.present.any(-1) & ~stopped & players.proves_agreement(point, image, tolerance)
    open_games = game.present.any(-1) & ~stopped & ~agreed
    if bool(open_games.any()):
        agreed[open_games] = agreement_exists(players, open_games, tolerance)
    return agreed


def _residual(game: ScaledGames, point: Tensor) -> Tensor:
    """[B], in the scaled coordinates: the value is the same as in the original ones, and nothing overflows."""
    target = game.power / point
    error = (game.matrix @ point[..., None])[..., 0] - target - game.linear
    relative = error.abs() / (target + game.linear.abs())
    return torch.where(game.present, relative, 0.0).amax(-1).nan_to_num(nan=torch.inf)
