"""Control initialisations: experts without information about the routed ones, to measure what a merge contributes."""

from collections.abc import Mapping

import torch

from .experts import Expert, Experts, ExpertWeights, Matrices


def random_experts(experts: Experts, count: int, seed: int) -> Expert:
    """Normal numbers of the mean square that the layer's own matrices have: ``count`` experts in their dtype."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(matrices: Matrices) -> torch.Tensor:
        size = sum(float(matrix.float().square().mean()) for matrix in matrices) / len(matrices)
        scale: float = size**0.5
        return (torch.randn(count, *matrices[0].shape, generator=draw) * scale).to(matrices[0])

    return experts.map(drawn)


def shared_experts(shared: Mapping[str, torch.Tensor], experts: Experts, count: int) -> Expert:
    """Slices of the shared expert, of the routed width, in turn: ``count`` experts in the routed experts' dtype.

    Args:
        shared: gate and up ``[width * slices, hidden]``, down ``[hidden, width * slices]``.
    """

    def sliced(name: str) -> torch.Tensor:
        side, like = int(name == "down_proj"), experts[name][0]
        slices = shared[name].split(like.shape[side], dim=side)
        return torch.stack([slices[number % len(slices)] for number in range(count)]).to(like)

    return ExpertWeights.of(sliced, experts)
