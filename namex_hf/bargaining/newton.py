"""The bargaining equation as a convex problem, and Newton's method on it.

C b = p / b + d with b > 0 is the stationarity of

    f(b) = b . C b / 2 - d . b - sum_i p_i log b_i        over b > 0,

which is strictly convex for a positive semidefinite C and powers p > 0. Everything here is float64 and batched: C is
[B, N, N] of unit diagonal, the vectors are [B, N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STEPS = 100
#: A full step this short, relative to b, was the last: convergence is quadratic, so its successor would be 1e-16.
LAST_STEP = 1e-8
#: Full steps granted before rounding is taken to have stopped the convergence: from a step of 1/4 it needs five.
FULL_STEPS = 8


@dataclass(frozen=True)
class Iterate:
    """Where Newton's method stopped: the point [B, N], the steps taken [B], the problems it was told to leave [B]."""

    point: Tensor
    steps: Tensor
    left: Tensor


def minimise(
    matrix: Tensor, linear: Tensor, power: Tensor, leave: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Iterate:
    """Minimise b . C b / 2 - d . b - sum p log b over b > 0, each problem of the batch on its own.

    Args:
        matrix: C, [B, N, N], unit diagonal.
        linear: d, [B, N].
        power: p > 0, [B, N].
        leave: called with b and C b (both [B, N]); says [B] which problems are not worth a further step, because they
            are seen to have no minimum.

    A step is t times the Newton direction. With r = direction / b and w = max(0, max(-r)), -log(1 + t r) + t r is at
    most t^2 r^2 / (2 (1 - t w)), so f falls by at least g^2 t - g^2 t^2 / (2 (1 - t w)), g the Newton decrement. Hence
    t = 1 is safe for w <= 1/4, t = 1 / (1 + w) always: f falls by g^2 / (2 (1 + w)) whatever the powers are, b stays
    positive, and no line search is needed. The start is the minimum along the ray through sqrt(p), which is in closed
    form and exact for players that are all alike; minimising along the ray again after every step was tried, and took a
    tenth more steps.
    """
    point = _on_ray(power.sqrt(), _apply(matrix, power.sqrt()), linear, power)
    steps = torch.zeros(len(point), dtype=torch.int64, device=point.device)
    full = torch.zeros_like(steps)
    running = torch.ones_like(steps, dtype=torch.bool)
    left = torch.zeros_like(running)
    for _ in range(MAX_STEPS):
        image = _apply(matrix, point)
        if leave is not None:
            left = left | (running & leave(point, image))
            running = running & ~left
        if not bool(running.any()):
            break
        relative = _direction(matrix, point, image, linear, power)
        shrink = (-relative).amax(-1).clamp(min=0)
        whole = shrink <= 0.25
        length = torch.where(whole, 1.0, 1 / (1 + shrink))
        moved = point * (1 + length[:, None] * relative)
        longest = relative.abs().amax(-1)
        near = longest <= 0.25
        point = torch.where(running[:, None], moved, point)
        steps = steps + running
        full = full + (running & near)
        running = running & (longest > LAST_STEP) & (full < FULL_STEPS)
    return Iterate(point, steps, left)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _on_ray(point: Tensor, image: Tensor, linear: Tensor, power: Tensor) -> Tensor:
    """c b with the c > 0 that minimises f along the ray: c^2 b.Cb - c d.b = sum p."""
    # Rounding may make the square negative where there is no minimum; bounded below, it keeps the step finite.
    floor = torch.finfo(point.dtype).eps * point.sum(-1).square()
    square = torch.maximum((point * image).sum(-1), floor)
    slope = (linear * point).sum(-1)
    root = (slope * slope + 4 * power.sum(-1) * square).sqrt()
    # Of the two forms of the root, the one that does not subtract nearly equal numbers.
    factor = torch.where(slope > 0, (slope + root) / (2 * square), 2 * power.sum(-1) / (root - slope))
    return point * factor[:, None]


def _direction(matrix: Tensor, point: Tensor, image: Tensor, linear: Tensor, power: Tensor) -> Tensor:
    """Newton direction relative to b: (B C B + P) r = p + b (d - C b), B = diag b, P = diag p; [B, N].

    The variable sqrt(p) r keeps the matrix at I + (something positive), whatever the powers.
    """
    root = power.sqrt()
    scale = point / root
    hessian = scale[:, :, None] * matrix * scale[:, None, :]
    hessian.diagonal(dim1=-2, dim2=-1).add_(1.0)
    right = root + scale * (linear - image)
    factor, info = torch.linalg.cholesky_ex(hessian)
    if bool(info.any()):
        factor = _shifted_factor(hessian)
    return torch.cholesky_solve(right[..., None], factor)[..., 0] / root


def _shifted_factor(hessian: Tensor) -> Tensor:
    """Cholesky factor after lifting the eigenvalues that rounding of C has made negative; the gradient stays exact."""
    unit = hessian.diagonal(dim1=-2, dim2=-1).sqrt()
    scaled = hessian / unit[:, :, None] / unit[:, None, :]
    lowest = torch.linalg.eigvalsh(scaled)[:, 0]
    eps = torch.finfo(hessian.dtype).eps * hessian.shape[-1]
    scaled.diagonal(dim1=-2, dim2=-1).add_(((-2 * lowest).clamp(min=0) + (lowest < eps) * eps)[:, None])
    factor: Tensor = torch.linalg.cholesky_ex(scaled).L
    return factor * unit[:, :, None]
