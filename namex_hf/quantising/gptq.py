"""GPTQ (Frantar et al. 2022): inputs are rounded one after the other, and the rest of the row makes up for each error.

For ``sum_t |(Q - W) x_t|^2`` only the second moments ``H = sum_t x_t x_t^T`` count. Once inputs are rounded, the others
have a best value in closed form; the Cholesky factor of H^-1 holds these steps for all rows at once.
"""

import torch
from torch import Tensor

from ..merging.curvature import with_ridge
from .grid import best_grid, group_size, rounded_to_nearest

RIDGE = 0.01
"""Added to the diagonal of H, relative to its mean, as the paper does."""


def output_error(change: Tensor, moment: Tensor) -> Tensor:
    """``sum_t ((Q - W) x_t)^2`` of each row ``[rows]``. Args: change, Q - W; moment, H."""
    return ((change @ moment) * change).sum(1)


def gptq(matrix: Tensor, moment: Tensor, bits: int) -> Tensor:
    """A matrix ``[rows, columns]`` with every number on the grid of its group, float32.

    The grid of a group is that of `best_grid` for what its numbers have become by then. A row for which plain rounding
    has the smaller error takes plain rounding: the order of inputs is fixed, so compensation alone promises nothing.

    Args:
        matrix: finite.
        moment: H, ``[columns, columns]`` float32 or float64, positive semidefinite; zeros where no token came.

    Memory: H, its inverse and three times the matrix in float64.
    """
    ridged = with_ridge(moment.double(), RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    rest, result = matrix.float().clone(), torch.empty_like(matrix, dtype=torch.float32)
    size = group_size(matrix.shape[1])
    for start in range(0, matrix.shape[1], size):
        end = start + size
        grid, errors = best_grid(rest[:, start:end], bits), torch.empty_like(rest[:, start:end])
        for column in range(start, end):
            result[:, column] = grid.nearest(rest[:, column, None])[:, 0]
            error = (rest[:, column] - result[:, column]) / upper[column, column]
            rest[:, column:end].addr_(error, upper[column, column:end], alpha=-1)
            errors[:, column - start] = error
        rest[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    plain, weights, sums = rounded_to_nearest(matrix, bits), matrix.double(), moment.double()
    is_worse = output_error(plain - weights, sums) < output_error(result - weights, sums)
    return torch.where(is_worse[:, None], plain, result)
