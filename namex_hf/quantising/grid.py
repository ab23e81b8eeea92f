"""Asymmetric grids of few levels, one for each group of a row's inputs, and rounding to the nearest level."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = (32, 16)
"""Inputs of a group: the first of these that divides a row, else the whole row."""
SHARES = torch.linspace(0.4, 1, 21).tolist()
"""Shares of a group's range that are tried: with few levels a narrower grid has the smaller error."""
SCALE_BITS = 16
"""Of a group's scale; its zero takes as many bits as a level."""
LEAST = 2.0**-24  # the smallest scale that float16 holds


def group_size(columns: int) -> int:
    """Inputs of a group in a matrix of so many columns."""
    return next((size for size in GROUPS if columns % size == 0), columns)


def stored_bits(rows: int, columns: int, bits: int) -> int:
    """Bits of a quantised matrix: its levels, and a scale and a zero a group."""
    return rows * columns * bits + rows * columns // group_size(columns) * (SCALE_BITS + bits)


@dataclass(frozen=True)
class Grid:
    """The numbers ``scale (level - zero)`` for whole levels from 0 to ``2**bits - 1``.

    Attributes:
        scale: ``[groups, 1]`` float32, each a number that float16 holds.
        zero: ``[groups, 1]`` float32, whole, one of the levels: 0 is on every grid.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest number of each group's grid. Args: values, ``[groups, any]``."""
        levels = (values / self.scale).round_().add_(self.zero).clamp_(0, 2**self.bits - 1)
        return levels.sub_(self.zero).mul_(self.scale)


def best_grid(values: Tensor, bits: int) -> Grid:
    """For each group the grid of least squared error among those that span `SHARES` of its range and hold 0.

    Args:
        values: float32 ``[groups, size]``, finite.
    """
    low, high = values.amin(1, keepdim=True).clamp_(max=0), values.amax(1, keepdim=True).clamp_(min=0)
    best, least = Grid(torch.ones_like(low), torch.zeros_like(low), bits), torch.full_like(low, torch.inf)
    for share in SHARES:
        scale = ((high - low) * share / (2**bits - 1)).half().float().clamp_(min=LEAST)
        grid = Grid(scale, (-low * share / scale).round_().clamp_(0, 2**bits - 1), bits)
        error = (grid.nearest(values) - values).square_().sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(torch.where(better, scale, best.scale), torch.where(better, grid.zero, best.zero), bits)
    return best


def rounded_to_nearest(matrix: Tensor, bits: int) -> Tensor:
    """A matrix ``[rows, columns]`` with every number on the grid of its group, float32."""
    groups = matrix.float().reshape(-1, group_size(matrix.shape[1]))
    return best_grid(groups, bits).nearest(groups).view(matrix.shape)
