"""Trainable curvature of ``merge: soft``: M_i of NAMEx eq. 2 and 9 as a sum of Kronecker products, as in CAMEx.

For a matrix tau ``[rows, columns]``

    M(tau) = sum_r (A1_r x A2_r) tau (B1_r x B2_r)^T

with ``x`` the Kronecker product. The sides of A1 and A2 are the divisors of `rows` nearest to its square root, those of
B1 and B2 the divisors of `columns` (2048 = 32 x 64, 1408 = 32 x 44). At rank 1 an expert of this size has 24,240
entries of curvature.

The initial value is the identity at any rank: the first product is I; the others have ``B2 = 0`` and random entries
elsewhere. (CAMEx's code starts with I in all products, which is `rank` times the identity. Scaled by 1/rank it would be
the identity too, but all products would have the same gradient and stay equal.)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init


def factor_pair(size: int) -> tuple[int, int]:
    """The two divisors of `size` that are nearest to its square root, the smaller first."""
    smaller = next(divisor for divisor in range(math.isqrt(size), 0, -1) if size % divisor == 0)
    return smaller, size // smaller


def kronecker_parameters(hidden: int, width: int, rank: int) -> int:
    """Number of entries of one expert's curvature, over its three matrices."""
    return 3 * rank * sum(side * side for size in (hidden, width) for side in factor_pair(size))


class Factors(NamedTuple):
    """M_i of every expert for one projection: A1, A2, B1, B2, each ``[experts, rank, side, side]``."""

    left_outer: Tensor
    left_inner: Tensor
    right_outer: Tensor
    right_inner: Tensor

    def of(self, used: Tensor | None) -> "Factors":
        """The factors of some experts; None: all."""
        return self if used is None else Factors(*(factor[used] for factor in self))


Kronecker = tuple[Factors, Factors, Factors]
"""The factors of gate, up and down."""


def curved(tau: Tensor, factors: Factors) -> Tensor:
    """``M_i(tau_i)`` of every expert, ``[experts, rows, columns]``.

    Memory: beyond the result, `tau` twice; with gradients four times for every rank.
    """
    count, rows, columns = tau.shape
    total = None
    for a1, a2, b1, b2 in zip(*(factor.to(tau.dtype).unbind(1) for factor in factors), strict=True):
        (outer, inner), (left, right) = (a1.shape[-1], a2.shape[-1]), (b1.shape[-1], b2.shape[-1])
        term = tau.reshape(count, rows * left, right) @ b2.mT
        term = b1[:, None] @ term.view(count, rows, left, right)
        term = a2[:, None] @ term.view(count, outer, inner, columns)
        term = a1 @ term.view(count, outer, inner * columns)
        total = term if total is None else total + term
    assert total is not None
    return total.view(count, rows, columns).to(tau.dtype)  # autocast multiplies in another dtype


def bent(
    gate_up: Tensor, down: Tensor, base: tuple[Tensor, Tensor] | None, curvature: Kronecker, used: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``E_m + M_i (E_i - E_m)``, which replaces ``E_i`` in a linear merge; without a base expert ``M_i E_i``.

    Args:
        gate_up: ``[used experts, 2 * width, hidden]``; down: ``[used experts, hidden, width]``.
        used: indices of the used experts; None: all.
    """
    if base is not None:
        gate_up, down = bent(gate_up - base[0], down - base[1], None, curvature, used)
        return gate_up + base[0], down + base[1]
    of_gate, of_up, of_down = (factors.of(used) for factors in curvature)
    gate, up = gate_up.chunk(2, dim=1)
    return torch.cat([curved(gate, of_gate), curved(up, of_up)], dim=1), curved(down, of_down)


class KroneckerProducts(nn.Module):
    """The trainable M_i for a projection of ``[rows, columns]``. The forward returns them.

    A forward is needed for wrappers (PEFT's ``modules_to_save``, offloading), which act on it.
    """

    def __init__(self, experts: int, rows: int, columns: int, rank: int):
        super().__init__()
        for name, side in zip(Factors._fields, (*factor_pair(rows), *factor_pair(columns)), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(experts, rank, side, side)))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the identity. Tensors loaded from a checkpoint are not changed."""
        for name, factor in self.named_parameters():
            init.copy_(factor, identity(factor, name == "right_inner", generator))

    def forward(self, like: Tensor) -> Factors:
        """Args: like, a tensor of the pass, which wrappers read."""
        return Factors(*(getattr(self, name) for name in Factors._fields))


class KroneckerCurvature(nn.Module):
    """A layer's trainable M_i; parameters ``{gate,up,down}_proj.{left,right}_{outer,inner}``."""

    def __init__(self, experts: int, hidden: int, width: int, rank: int):
        super().__init__()
        self.gate_proj = KroneckerProducts(experts, width, hidden, rank)
        self.up_proj = KroneckerProducts(experts, width, hidden, rank)
        self.down_proj = KroneckerProducts(experts, hidden, width, rank)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the identity."""
        for products in (self.gate_proj, self.up_proj, self.down_proj):
            products.reset_parameters(generator)

    def forward(self, like: Tensor) -> Kronecker:
        """The factors of gate, up and down. Args: like, a tensor of the pass, which wrappers read."""
        return self.gate_proj(like), self.up_proj(like), self.down_proj(like)


def identity(like: Tensor, zeroed: bool, generator: torch.Generator | None = None) -> Tensor:
    """Initial value of a factor ``[experts, rank, side, side]``: I in the first product, in the others as above.

    Args:
        zeroed: whether this factor is zero in the other products.
    """
    experts, rank, side, _ = like.shape
    start = torch.zeros(experts, rank, side, side, device=like.device)
    if not zeroed and rank > 1 and not like.is_meta:
        start.normal_(std=1 / math.sqrt(side), generator=generator)
    if not like.is_meta:
        start[:, 0] = torch.eye(side, device=like.device)
    return start.to(like.dtype)
