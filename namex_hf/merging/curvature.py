"""Curvature from calibration text: the error that a change of an expert's matrix makes on the expert's own tokens.

For a linear map W and the inputs x of expert i with gate values g, the loss of replacing E_i by W is
``sum_t g_t^2 |(W - E_i) x_t|^2 = tr((W - E_i) C_i (W - E_i)^T)``, the second moment ``C_i = sum_t g_t^2 x_t x_t^T``.
Its weighted sum over experts is least at

    W = (sum_i w_i E_i C_i) (sum_i w_i C_i)^-1

(RegMean, Jin et al. 2023; in the paper's eq. 2 that is ``M_i = C_i (sum_j C_j)^-1``). The usage of an expert is inside
its C_i already. ``diagonal`` keeps only the diagonal of C_i.
"""

from dataclasses import dataclass

import torch


def second_moment(inputs: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``sum_t g_t^2 x_t x_t^T``, ``[width, width]``, in the dtype of `inputs`.

    Args:
        inputs: ``[tokens, width]``, of one linear map of one expert.
        gate: ``[tokens]``.
    """
    return (inputs * gate.square()[:, None]).T @ inputs


def sums_memory(hidden: int, width: int) -> int:
    """Bytes of sums of second moments and products in float64: those of a whole expert."""
    return 8 * (3 * hidden * hidden + 6 * hidden * width)


LEAST = 1e-30
"""Curvature of an expert without tokens: negligible beside others, and enough for a group of such experts."""


def with_ridge(moment: torch.Tensor, ridge: float) -> torch.Tensor:
    """``C + ridge * mean(diag C) * I``: directions without tokens are averaged by usage, not lost.

    Args:
        moment: ``[width, width]``, or its diagonal ``[width]``.
    """
    curvature = moment if moment.ndim == 1 else moment.diagonal()
    added = (ridge * curvature.mean()).clamp(min=LEAST)
    return moment + (added if moment.ndim == 1 else added * torch.eye(len(moment)).to(moment))


@dataclass
class CurvedSum:
    """``(sum_i w_i E_i C_i)(sum_i w_i C_i)^-1``, summed up one expert at a time.

    Memory: one matrix and one second moment in float64, whatever the number of experts.
    """

    diagonal: bool
    ridge: float
    products: torch.Tensor | None = None
    moments: torch.Tensor | None = None

    def add(self, weight: float, matrix: torch.Tensor, moment: torch.Tensor) -> None:
        """Add an expert.

        Args:
            matrix: E_i, ``[rows, columns]``.
            moment: C_i, ``[columns, columns]``.
        """
        if self.diagonal:
            curvature = with_ridge(moment.diagonal(), self.ridge)
            product = matrix * curvature
        else:
            curvature = with_ridge(moment, self.ridge)
            product = matrix @ curvature
        if self.products is None or self.moments is None:
            self.products, self.moments = product.double() * weight, curvature.double() * weight
        else:
            self.products.add_(product, alpha=weight)
            self.moments.add_(curvature, alpha=weight)

    def solve(self) -> torch.Tensor:
        """W, float64; solved by Cholesky's decomposition, nothing is inverted."""
        assert self.products is not None
        assert self.moments is not None
        if self.diagonal:
            return self.products / self.moments
        return torch.cholesky_solve(self.products.T, torch.linalg.cholesky(self.moments)).T
