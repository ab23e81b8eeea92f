"""The base expert that a layer itself gives: of the first MoE layer, or of every one (CAMEx)."""

from collections.abc import Callable

import torch

from ..recipe import BaseExpert
from .experts import PROJECTIONS, Base, Experts, weighted_step


def own_base(choice: BaseExpert, experts: Experts, shared: Callable[[], Base], width: int) -> dict[str, torch.Tensor]:
    """A layer's own base expert, in float32.

    Args:
        experts: of the layer.
        shared: reads the layer's shared expert, where it is asked for.
        width: of a routed expert.
    """
    if choice.base == "mean":
        return mean_expert(experts)
    if choice.base == "shared":
        return mean_slice(shared(), width)
    assert choice.index is not None
    return {name: experts[name][choice.index].float() for name in PROJECTIONS}


def mean_expert(experts: Experts) -> dict[str, torch.Tensor]:
    """The plain mean of all experts, in float32."""
    count = len(experts["gate_proj"])
    uniform = torch.full((count,), 1 / count)
    nothing = {name: torch.zeros(experts[name][0].shape) for name in PROJECTIONS}
    return {name: weighted_step(experts[name], nothing[name], uniform) for name in PROJECTIONS}


def mean_slice(shared: Base, width: int) -> dict[str, torch.Tensor]:
    """The mean of a shared expert's slices of the routed width, in float32.

    A SwiGLU MLP of width k * ``width`` is the sum of k experts of ``width``: rows of gate and up, columns of down.

    Args:
        shared: gate and up ``[k * width, hidden]``, down ``[hidden, k * width]``.
    """
    result = {}
    for name in PROJECTIONS:
        axis = 1 if name == "down_proj" else 0
        result[name] = torch.stack(shared[name].float().split(width, dim=axis)).mean(0)
    return result
