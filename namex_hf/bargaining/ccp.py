"""The convex-concave procedure for the bargaining equation (Navon et al. 2022), to set beside the exact solution.

With beta_i(a) = (K a)_i, the equation K a = 1 / a asks for phi_i(a) = log a_i + log beta_i(a) = 0. Each phi_i is
concave, so phi_i >= 0 is a convex constraint. Navon et al. seek the point at which all constraints are tight by
minimising

    sum_i beta_i(a) + phi(a)     subject to     phi_i(a) >= 0,  a > 0,        phi = sum_i phi_i.

The first iteration minimises the first term, which is linear, without phi; this often suffices. phi is concave: every
later iteration replaces it by its linearisation at the last point, and solves that convex problem. Every point
satisfies the constraints, so the logarithms of the next linearisation exist, and the objective is bounded from below.

`nash_bargaining` solves the same equation to rounding, in a fraction of the time. The procedure is here for
comparison: Nguyen et al., Expert Merging in Sparse MoE with Nash Bargaining, use it with 2 iterations a layer.
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

#: A relative change of the point below this is within Clarabel's own accuracy: the procedure ends.
STANDSTILL = 1e-7


def ccp_bargaining(gram: Tensor, iterations: int = 2, precision: torch.dtype | None = None) -> NashSolution:
    """Approximate K a = 1 / a, a > 0, by the convex-concave procedure, with cvxpy on the CPU, game by game.

    The disagreement point is 0 and all powers are 1: the procedure was published for this case only.

    Args:
        gram: K, [..., N, N], as for `nash_bargaining`. It is scaled to Frobenius norm 1 first, because the balance
            between the two terms of the objective depends on its unit.
        iterations: greatest number of convex problems a game; fewer are solved once the point has converged.
        precision: dtype of the players' vectors, as for `nash_bargaining`.

    Returns:
        A `NashSolution`. `residual` is computed as by `nash_bargaining`, max_i |a_i (K a)_i - 1|, but decides nothing:
        weights of any accuracy are returned, 0 without agreement. `status` is decided as there, by the players alone.
        It is also 'no_agreement' where cvxpy's solver finds no point at all. If it fails later, the last point is
        returned. `iterations` counts the convex problems that were tried.

    Raises:
        MissingExtraError: cvxpy is not installed.
        ValueError: iterations < 1, or a Gram matrix that `nash_bargaining` refuses.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 is needed")
    game = checked_game(gram, None, None)
    cvxpy = _solver()
    tolerance = Tolerance.of(precision or gram.dtype, gram.dtype)
    has_players = game.present.any(-1)
    agreed = has_players.clone()
    if bool(has_players.any()):
        agreed[has_players] = agreement_exists(
            Players.of(game.matrix, game.linear, game.power, game.present), has_players, tolerance
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
        solution = torch.from_numpy(point).to(weights)
        scaled = solution / unscale
        residual[index] = (scaled * (cosines @ scaled) - 1).abs().max()
        weights[index, players] = solution
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
        return importlib.import_module("cvxpy")
    except ImportError as error:
        raise MissingExtraError("solver ccp", "ccp") from error


def _procedure(cvxpy: ModuleType, gram: np.ndarray, iterations: int) -> tuple[np.ndarray | None, int]:
    """The last point, or None, and the number of convex problems that were tried."""
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
        # Gradient of phi. The constant of the linearisation does not change the minimiser.
        slope.value = np.zeros(len(matrix)) if point is None else 1 / point + matrix @ (1 / (matrix @ point))
        candidate = _minimum(cvxpy, problem, weights)
        if candidate is None or not ((candidate > 0).all() and (matrix @ candidate > 0).all()):
            break
        converged = point is not None and bool(np.abs(candidate / point - 1).max() < STANDSTILL)
        point = candidate
        if converged:
            break
    return (None if point is None else point / np.sqrt(norm)), taken


def _minimum(cvxpy: ModuleType, problem: object, variable: object) -> np.ndarray | None:
    """The minimiser, or None where the solver fails. Reduced accuracy is accepted: the residual shows it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy warns of reduced accuracy
        try:
            problem.solve(solver=cvxpy.CLARABEL)  # type: ignore[attr-defined]
        except cvxpy.SolverError:
            return None
    value = variable.value  # type: ignore[attr-defined]
    return np.array(value, dtype=np.float64) if value is not None and np.isfinite(value).all() else None
