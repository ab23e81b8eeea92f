"""The bargain over quadratic losses as a convex problem in N numbers, and Newton's method on it.

Write X = W - W_0, D_i = E_i - W_0 and B_i = D_i C_i. What player i gains by W, its loss at W_0 less that at W, is

    gain_i(X) = 2 tr(X B_i^T) - tr(X C_i X^T).

Weigh the players with w > 0. The X that makes the weighted sum of gains largest, and that largest sum, are

    X(w) = B S^-1,    psi(w) = tr(B S^-1 B^T),        B = sum w_i B_i,  S = sum w_i C_i.

psi is convex (a maximum of functions linear in w), of degree 1 in w, and its gradient is gain_i(X(w)) =: g_i(w). The
bargain, the largest sum p_i log gain_i, is dual to

    minimise  f(w) = psi(w) - sum p_i log w_i        over w > 0,

whose stationarity is w_i g_i = p_i. How far w is from it bounds what X(w) lacks: log y <= r y - 1 - log r for r > 0 and
sum w_i gain_i <= psi(w), so no W has a welfare larger than that of X(w) by more than
sum p_i (r_i - 1 - log r_i), r_i = w_i g_i / p_i.

Second derivatives. With R_i = X(w) C_i - B_i: dX / dw_i = -R_i S^-1, hence d^2 psi / dw_i dw_j = 2 tr(R_i S^-1 R_j^T).
One product of this matrix H with a vector v costs no more than four products of the size of X C, whatever N is:

    V = sum v_i R_i = X (sum v_i C_i) - sum v_i B_i,    Y = V S^-1,    (H v)_i = 2 tr(C_i X^T Y) - 2 tr(Y B_i^T),

while H itself takes two of that size for each player. So the Newton system is solved by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from namex_hf.bargaining.newton import FULL_STEPS, MAX_STEPS

#: Where |w_i g_i / p_i - 1| is below this for all, no further step is taken; the welfare is then within 1e-20.
TARGET = 1e-10


@dataclass(frozen=True)
class Point:
    """w [N] with psi(w) = sum p, the Cholesky factor of S [cols, cols], X(w) [rows, cols], and the gains g [N]."""

    weights: Tensor
    factor: Tensor
    move: Tensor
    gains: Tensor


@dataclass(frozen=True)
class Dual:
    """psi and its derivatives for players whose losses at the disagreement point are 1.

    moments: C_i as given, any floating dtype, any device; unit: what C_i is multiplied with [N]; ridge: what is then
    added to its diagonal [N]; pulls: B_i [N, rows, cols]; power: p > 0 [N]. All but the moments are float64.
    """

    moments: Sequence[Tensor]
    unit: Tensor
    ridge: Tensor
    pulls: Tensor
    power: Tensor

    def at(self, weights: Tensor) -> Point | None:
        """The point on the ray through w where f is smallest: psi is sum p there. None where psi is 0.

        Raises ValueError where S is not positive definite to rounding.
        """
        factor, broken = torch.linalg.cholesky_ex(self._moment(weights))
        if int(broken):
            raise ValueError("the moments' weighted sum is not positive definite to rounding; pass a larger ridge")
        pull = self._pull(weights)
        move = _solve(factor, pull)
        psi = (pull * move).sum()
        if not float(psi) > 0:
            return None
        gains = 2 * self._against_pulls(move) - self._against_moments(move.T @ move)
        along = self.power.sum() / psi
        return Point(weights * along, factor * along.sqrt(), move, gains)

    def curvature(self, point: Point, vector: Tensor) -> Tensor:
        """H v, [N]."""
        drift = point.move @ self._moment(vector) - self._pull(vector)
        answer = _solve(point.factor, drift)
        return 2 * (self._against_moments(point.move.T @ answer) - self._against_pulls(answer))

    def _moment(self, vector: Tensor) -> Tensor:
        """sum v_i C_i, [cols, cols]."""
        total = self.pulls.new_zeros(self.pulls.shape[-1], self.pulls.shape[-1])
        for moment, factor in zip(self.moments, (vector * self.unit).tolist(), strict=True):
            total.add_(moment.to(total.device).to(total.dtype), alpha=factor)
        total = (total + total.T) / 2
        total.diagonal().add_((vector * self.ridge).sum())
        return total

    def _pull(self, vector: Tensor) -> Tensor:
        """sum v_i B_i, [rows, cols]."""
        return (vector @ self.pulls.flatten(1)).view(self.pulls.shape[1:])

    def _against_moments(self, matrix: Tensor) -> Tensor:
        """tr(C_i Z) for a matrix Z [cols, cols], [N]."""
        even = (matrix + matrix.T) / 2
        traces = torch.stack([(even * moment.to(even.device).to(even.dtype)).sum() for moment in self.moments])
        return traces * self.unit + even.trace() * self.ridge

    def _against_pulls(self, matrix: Tensor) -> Tensor:
        """tr(Z B_i^T) for a matrix Z [rows, cols], [N]."""
        return self.pulls.flatten(1) @ matrix.flatten()


@dataclass(frozen=True)
class Optimum:
    """Where Newton's method stopped: the last point, None where a witness was met; its residual; the steps taken."""

    point: Point | None
    residual: float
    steps: int


def minimise_dual(dual: Dual, least: Tensor) -> Optimum:
    """Minimise f over w > 0, or find a witness against an agreement.

    Args:
        dual: the players.
        least: gains [N] that no longer count as such. A w > 0 with psi(w) <= sum w_i least_i proves that no W
            gives more to all: it is the witness. Where there is no agreement f has no minimum, and w runs into one.

    The step is that of `newton.minimise`, for the same reason. Along h with max(-h_i / w_i) <= u the sum S shrinks at
    most to (1 - t u) S, which bounds the curvature of psi by its first value over (1 - t u)^3; that of the logarithms
    by theirs over (1 - t u)^2. So f falls by at least g^2 t - g^2 t^2 / (2 (1 - t u)) with g^2 = h . f'' h, and no
    value of f is ever compared. Conjugate gradients, stopped anywhere, keep h . f'' h = -h . f', which is all that
    this takes.
    """
    point = dual.at(dual.power)
    steps, near = 0, 0
    while True:
        if point is None or float(dual.power.sum()) <= float(least @ point.weights):
            return Optimum(None, 1.0, steps)
        missing = 1 - point.weights * point.gains / dual.power
        residual = float(missing.abs().amax())
        if residual <= TARGET or steps == MAX_STEPS or near == FULL_STEPS:
            return Optimum(point, residual, steps)
        relative = _direction(dual, point, missing, min(0.1, residual))
        shrink = max(0.0, float(-relative.amin()))
        length = 1.0 if shrink <= 0.25 else 1 / (1 + shrink)
        near += residual <= 0.25
        steps += 1
        point = dual.at(point.weights * (1 + length * relative))


def _direction(dual: Dual, point: Point, missing: Tensor, accuracy: float) -> Tensor:
    """Newton direction relative to w: (W H W + P) r = P missing, W = diag w, P = diag p; [N].

    The variable sqrt(p) r keeps the matrix at I + (something positive), whatever the powers.
    """
    root = dual.power.sqrt()
    scale = point.weights / root
    scaled = conjugate_gradients(
        lambda vector: vector + scale * dual.curvature(point, scale * vector), root * missing, accuracy
    )
    return scaled / root


def conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor, accuracy: float) -> Tensor:
    """x with |A x - b| <= accuracy |b|, or as near as 2 N products come; A positive definite, b [N]."""
    found = torch.zeros_like(right)
    rest, way = right, right
    square = float(rest @ rest)
    enough = accuracy**2 * square
    for _ in range(2 * len(right)):
        if square <= enough:
            break
        image = product(way)
        length = square / float(way @ image)
        found = found + length * way
        rest = rest - length * image
        last, square = square, float(rest @ rest)
        way = rest + square / last * way
    return found


def _solve(factor: Tensor, matrix: Tensor) -> Tensor:
    """Z S^-1 for Z [rows, cols] and the Cholesky factor of S."""
    return torch.cholesky_solve(matrix.T, factor).T
