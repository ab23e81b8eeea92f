"""Experts that know nothing of a layer's routed ones: where a fit may begin, to tell what a merge contributes to it."""

import torch

from .experts import PROJECTIONS, Base, Experts


def random_experts(experts: Experts, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Normal numbers of the mean square that the layer's own matrices have: ``count`` experts in their dtype."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name in PROJECTIONS:
        matrices = experts[name]
        size = sum(float(matrix.float().square().mean()) for matrix in matrices) / len(matrices)
        drawn = torch.randn(count, *matrices[0].shape, generator=draw) * size**0.5
        made[name] = drawn.to(matrices[0])
    return made


def shared_experts(shared: Base, experts: Experts, count: int) -> dict[str, torch.Tensor]:
    """Slices of the shared expert, of the routed width, in turn: ``count`` experts in the routed experts' dtype.

    Args:
        shared: gate and up ``[width * slices, hidden]``, down ``[hidden, width * slices]``.
    """
    made = {}
    for name in PROJECTIONS:
        side = 1 if name == "down_proj" else 0
        like = experts[name][0]
        slices = shared[name].split(like.shape[side], dim=side)
        made[name] = torch.stack([slices[number % len(slices)] for number in range(count)]).to(like)
    return made
