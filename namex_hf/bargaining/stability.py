"""Whether the propagation of the base expert converges: the eigenvalues of the matrix R of Nguyen et al., eq. 19.

With momentum the base expert E_m changes from layer to layer by Nguyen et al., eq. 11 (complex momentum after Lorraine
et al. 2022):

    mu <- beta mu + sum_i w_i (E_i - E_m),      E_m <- E_m + Re(gamma mu).

Were all layers alike, this would be one linear map of (Re mu, Im mu, E_m), applied entry by entry, plus a constant. Its
spectral radius rho is the factor by which the distance to the fixed point shrinks in a layer, in the long run: below 1
the propagation converges (Nguyen et al., Theorem C.3), above 1 it grows. A network has a finite number of layers L, so
its factor is rho^L. The weights of real layers differ. If they sum to 1, R is the same in all layers; else rho is a
guide.

The paper bounds rho by a determinant (eq. 33), in which the entry (3, 2) of R, -gamma Im(beta), lacks its gamma. Here
the eigenvalues of the 3 x 3 matrix are computed instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def propagation_matrix(beta: complex, gamma: float, total_weight: float = 1.0) -> Tensor:
    """The 3 x 3 block of R (Nguyen et al., eq. 19), float64, in the coordinates (Re mu, Im mu, E_m).

    Args:
        beta: the momentum coefficient; 0 without momentum. For a quaternion b0 + b1 i + b2 j + b3 k it is
            b0 + i |(b1, b2, b3)|.
        gamma: the step.
        total_weight: sum of the weights w_i (the paper's bold alpha): 1 on the simplex.

    Raises:
        ValueError: a number that is not finite.
    """
    for name, number in (("beta", beta), ("gamma", gamma), ("total_weight", total_weight)):
        if not (math.isfinite(complex(number).real) and math.isfinite(complex(number).imag)):
            raise ValueError(f"{name} is {number}; finite numbers are accepted")
    real, imaginary = complex(beta).real, complex(beta).imag
    rows = [
        [real, -imaginary, -total_weight],
        [imaginary, real, 0.0],
        [gamma * real, -gamma * imaginary, 1.0 - gamma * total_weight],
    ]
    return torch.tensor(rows, dtype=torch.float64)


def spectral_radius(beta: complex, gamma: float, total_weight: float = 1.0) -> float:
    """rho(R), the largest modulus of an eigenvalue of `propagation_matrix`; |1 - gamma total_weight| for beta = 0."""
    matrix = propagation_matrix(beta, gamma, total_weight)
    # LAPACK's balancing of rows and columns does not converge on entries below the smallest normal number.
    matrix[matrix.abs() < torch.finfo(matrix.dtype).tiny] = 0.0
    return float(torch.linalg.eigvals(matrix).abs().max())


def largest_stable_step(beta: complex, total_weight: float = 1.0) -> float:
    """The gamma below which, down to 0, rho(R) < 1: the propagation converges for 0 < gamma < this.

    The characteristic polynomial of R is (x - 1) ((x - r)^2 + u^2) + g x (x - r) with beta = r + i u and
    g = gamma total_weight. By the criterion of Schur and Cohn its zeros lie within the unit circle where g is below

        2 ((1 + r)^2 + u^2) / (1 + r)                         (a zero passes through -1), and
        (1 - m) (1 + m +- 2 r) / |m - r|,  m = |beta|^2       (a pair of zeros leaves elsewhere; + for r > m, else -).

    Raises:
        ValueError: |beta| >= 1, where no step is stable, or a total weight that is not positive.
    """
    square = abs(beta) ** 2
    if not square < 1:
        raise ValueError(f"beta is {beta} of modulus {abs(beta):.6g}; accepted is a modulus below 1")
    if not 0 < total_weight < math.inf:
        raise ValueError(f"total_weight is {total_weight}; accepted are positive numbers")
    real, imaginary = complex(beta).real, complex(beta).imag
    through_minus_one = 2 * ((1 + real) ** 2 + imaginary**2) / (1 + real)
    gap = real - square
    sign = math.copysign(1.0, gap)
    as_pair = (1 - square) * (1 + square + sign * 2 * real) / abs(gap) if gap else math.inf
    return min(through_minus_one, as_pair) / total_weight
