"""A propagation step in a forward pass, differentiable in the experts and in the base."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..bargaining import CHUNK_BYTES
from ..merging.experts import Expert, by_projection, weighted_step
from ..merging.momentum import momentum_step
from ..models.soft_kronecker import Factors, curved
from ..recipe import AroundBase

LARGE = 64 * CHUNK_BYTES
"""Bytes of the working buffer on accelerators, where small chunks cost kernel launches and save no cache misses."""


class WeightedStep(torch.autograd.Function):
    """``sum_i w_i (E_i - E_m)`` (paper eq. 6 and 9) with constant weights: dE_i = w_i g, dE_m = -(sum w) g.

    Memory: only the weights are stored for the backward pass, which needs the experts once, in their own dtype.
    """

    @staticmethod
    def forward(ctx: Any, experts: torch.Tensor, base: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Args:
            experts: ``[N, rows, columns]``, in any floating dtype.
            base: ``[rows, columns]``, in float32 or float64.
            weights: float64 ``[N]``, on the CPU, without gradient.
        """
        ctx.shares, ctx.dtype = weights.tolist(), experts.dtype
        chunk = CHUNK_BYTES if base.device.type == "cpu" else LARGE
        with torch.autocast(base.device.type, enabled=False):  # autocast would multiply in 16 bits on accelerators
            return weighted_step(experts, base, weights, base.device, chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        to_experts = to_base = None
        if ctx.needs_input_grad[0]:
            to_experts = gradient.new_empty(len(ctx.shares), *gradient.shape, dtype=ctx.dtype)
            for row, share in zip(to_experts, ctx.shares, strict=True):
                torch.mul(gradient, share, out=row)  # rounds once, and needs no float32 copy of all experts
        if ctx.needs_input_grad[1]:
            to_base = gradient * -sum(ctx.shares)
        return to_experts, to_base, None


def curved_step(experts: torch.Tensor, base: torch.Tensor, weights: torch.Tensor, factors: Factors) -> torch.Tensor:
    """``sum_i w_i M_i(E_i - E_m)`` with constant weights (paper eq. 3, first line, where w_i = 1/N).

    Differentiable in experts, base and factors.

    Args:
        experts: ``[N, rows, columns]``, in any floating dtype.
        base: ``[rows, columns]``, in float32 or float64, in which it is computed.
        weights: float64 ``[N]``, on the CPU, without gradient.
        factors: factors of M_i, for every expert.

    Memory: that of `curved` for a single expert; the backward pass recomputes every expert.
    """
    step = torch.zeros_like(base)
    with torch.autocast(base.device.type, enabled=False):
        for weight, expert, *factor in zip(weights.tolist(), experts, *factors, strict=True):
            step = step + weight * checkpoint(_curved, expert, base, *factor, use_reentrant=False)
    return step


def _curved(expert: torch.Tensor, base: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
    """``M(E - E_m)`` of a single expert, with factors ``[rank, side, side]``."""
    return curved((expert.to(base.dtype) - base)[None], Factors(*(factor[None] for factor in factors)))[0]


@torch.compiler.disable  # a single graph break for each layer, in place of a break at each chunk and player
def step_on(
    experts: Expert,
    base: Mapping[str, torch.Tensor],
    momentum: Mapping[str, torch.Tensor],
    weights: torch.Tensor,
    merge: AroundBase,
    curvature: Mapping[str, Factors] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """E_m' = E_m + gamma sum_i w_i M_i(E_i - E_m), or the same with momentum (paper eq. 3, 9, 11), with gradients.

    The arithmetic of `merging.propagation.propagate`, without the games.

    Args:
        experts: experts of the layer, stacked.
        base: E_m of this layer, in float32 or float64.
        momentum: buffers from the layer before; empty at the first MoE layer.
        weights: float64 ``[games, N]``, on the CPU; constants.
        curvature: M_i by projection; None: the identity.

    Returns:
        The base of the next MoE layer, and its momentum buffers.
    """
    shares = by_projection(weights, merge.game.granularity)
    if curvature is None:
        step = {name: WeightedStep.apply(matrices, base[name], shares[name]) for name, matrices in experts.items()}
    else:
        step = {name: curved_step(one, base[name], shares[name], curvature[name]) for name, one in experts.items()}
    return momentum_step(base, step, momentum, merge.propagation.gamma, merge.propagation.complex_beta)
