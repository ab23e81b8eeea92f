"""The base expert from a layer's own experts: in the first MoE layer, or in every one (CAMEx)."""

from collections.abc import Callable, Mapping

import torch

from ..recipe import BaseExpert
from .experts import Expert, Experts, ExpertWeights, weighted_step


def own_base(
    choice: BaseExpert, experts: Experts, shared: Callable[[], Mapping[str, torch.Tensor]], width: int
) -> Expert:
    """A layer's own base expert, in float32.

    Args:
        experts: of the layer.
        shared: reads the layer's shared expert; called for ``base: shared`` only.
        width: of a routed expert.
    """
    if choice.base == "mean":
        return mean_expert(experts)
    if choice.base == "shared":
        return mean_slice(shared(), width)
    assert choice.index is not None
    return experts.expert(choice.index).map(torch.Tensor.float)


def mean_expert(experts: Experts) -> Expert:
    """The plain mean of all experts, in float32."""
    uniform, nothing = torch.full((experts.count,), 1 / experts.count), experts.zeros()
    return ExpertWeights.of(lambda name: weighted_step(experts[name], nothing[name], uniform), experts)


def mean_slice(shared: Mapping[str, torch.Tensor], width: int) -> Expert:
    """The mean of a shared expert's slices of the routed width, in float32.

    A SwiGLU MLP of width k * ``width`` is the sum of k experts of ``width``: rows of gate and up, columns of down.

    Args:
        shared: gate and up ``[k * width, hidden]``, down ``[hidden, k * width]``.
    """

    def mean(name: str) -> torch.Tensor:
        return torch.stack(shared[name].float().split(width, dim=int(name == "down_proj"))).mean(0)

    return ExpertWeights.of(mean)
