"""The convex-concave procedure for the bargaining equation (Navon et al. 2022), to set beside the exact solution.

With beta_i(a) = (K a)_i, the equation K a = 1 / a asks for phi_i(a) = log a_i + log beta_i(a) = 0. Each phi_i is
concave, so phi_i >= 0 is a convex constraint, and Navon et al. look for the point at which all of these are tight by
minimising

    sum_i beta_i(a) + phi(a)     subject to     phi_i(a) >= 0,  a > 0,        phi = sum_i phi_i.

The first term is linear, and alone often enough: minimising it, phi left out, is the first iteration. phi is concave: a
convex-concave procedure replaces it by its linearisation at the last point, and solves that convex problem, again and
again. Every point satisfies the constraints, so the logarithms of the next linearisation exist, and the objective is
bounded from below.

Nothing in `namex_hf` needs this: `nash_bargaining` solves the same equation, to rounding and in a fraction of the time.
It is here because Nguyen et al., Expert Merging in Sparse MoE with Nash Bargaining, solve it so, with 2 iterations a
layer.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingExtraError
from .checks import checked_game
from .existence import Players, Tolerance, agreement_exists
from .nash import AGREEMENT, NO_AGREEMENT, NashSolution

#: A point that moves by less than this, relative to itself, is where ECOS's own accuracy has ended the procedure.
STANDSTILL = 1e-7


def ccp_bargaining(gram: Tensor, iterations: int = 2, precision: torch.dtype | None = None) -> NashSolution:
    """Approximate K a = 1 / a, a > 0, by the convex-concave procedure, with cvxpy and ECOS on the CPU, game by game.

    The disagreement point is 0 and all powers are 1: the procedure was published for no other.

    Args:
        gram: K, [..., N, N], as for `nash_bargaining`. Scaled to Frobenius norm 1 before it is solved, as the weight
            between the two terms of the objective depends on its unit.
        iterations: at most this many convex problems a game. Fewer once the point stands still.
        precision: dtype that the players' vectors had, as for `nash_bargaining`.

    Returns:
        A `NashSolution`. `residual` is measured as for `nash_bargaining`, max_i |a_i (K a)_i - 1|, but decides nothing:
        the weights are what the iterations bought, 0 without agreement. `status` is decided as there, by the players
        alone; it is 'no_agreement' also where ECOS finds no point at all. If it fails later, the last point is kept.
        `iterations` are those taken.

    Raises:
        MissingExtraError: cvxpy or ECOS is not installed.
        ValueError: iterations < 1, or a Gram matrix that `nash_bargaining` refuses.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 is needed")
    game = checked_game(gram, None, None)
    cvxpy = _solver()
    tolerance = Tolerance.of(precision or gram.dtype, gram.dtype)
    anyone = game.present.any(-1)
    agreed = anyone.clone()
    if bool(anyone.any()):
        agreed[anyone] = agreement_exists(
            Players.of(game.matrix, game.linear, game.power, game.present), anyone, tolerance
        )
    weights = torch.zeros_like(game.unscale)
    residual = torch.ones_like(weights[:, 0])
    taken = torch.zeros_like(residual, dtype=torch.int64)
    statuses = [NO_AGREEMENT] * len(weights)
    for index in agreed.nonzero().flatten().tolist():
        players, unscale = game.present[index], game.unscale[index][game.present[index]]
        cosines = game.matrix[index][players][:, players]
        point, taken[index] = _procedure(cvxpy, (cosines / unscale / unscale[:, None]).cpu().numpy(), iterations)
        if point is None:
            continue
        found = torch.from_numpy(point).to(weights)
        unit = found / unscale
        residual[index] = (unit * (cosines @ unit) - 1).abs().max()
        weights[index, players] = found
        statuses[index] = AGREEMENT
    batch, count = gram.shape[:-2], gram.shape[-1]
    return NashSolution(
        weights=weights.reshape(*batch, count).to(gram.device),
        residual=residual.reshape(batch).to(gram.device),
        iterations=taken.reshape(batch).to(gram.device),
        status=statuses if batch else statuses[0],
    )


def _solver() -> ModuleType:
    try:
        importlib.import_module("ecos")
        return importlib.import_module("cvxpy")
    except ImportError as error:
        raise MissingExtraError("solver ccp", "ccp") from error


def _procedure(cvxpy: ModuleType, gram: np.ndarray, iterations: int) -> tuple[np.ndarray | None, int]:
    """The last point, None where there is none, and the number of convex problems solved or tried."""
    norm = np.linalg.norm(gram)
    matrix = gram / norm
    weights = cvxpy.Variable(len(matrix), pos=True)
    gains = matrix @ weights
    slope = cvxpy.Parameter(len(matrix))
    problem = cvxpy.Problem(
        cvxpy.Minimize(cvxpy.sum(gains) + slope @ weights), [cvxpy.log(weights) + cvxpy.log(gains) >= 0]
    )
    point: np.ndarray | None = None
    taken = 0
    while taken < iterations:
        taken += 1
        # Gradient of phi; what is constant in the linearisation does not move the minimum.
        slope.value = np.zeros(len(matrix)) if point is None else 1 / point + matrix @ (1 / (matrix @ point))
        following = _minimum(cvxpy, problem, weights)
        if following is None or not ((following > 0).all() and (matrix @ following > 0).all()):
            break
        still = point is not None and bool(np.abs(following / point - 1).max() < STANDSTILL)
        point = following
        if still:
            break
    return (None if point is None else point / np.sqrt(norm)), taken


def _minimum(cvxpy: ModuleType, problem: object, variable: object) -> np.ndarray | None:
    """None where ECOS fails; a point of reduced accuracy is taken, since the residual says how good it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy's, of reduced accuracy
        try:
            problem.solve(solver=cvxpy.ECOS)  # type: ignore[attr-defined]
        except cvxpy.SolverError:
            return None
    value = variable.value  # type: ignore[attr-defined]
    return np.array(value, dtype=np.float64) if value is not None and np.isfinite(value).all() else None
