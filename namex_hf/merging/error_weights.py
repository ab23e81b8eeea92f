"""How much the error of a token counts."""

import torch
from torch import Tensor

from ..recipe.choices import ErrorWeights

TINY = torch.finfo(torch.float32).tiny  # in the place of 0, where experts are zero


def error_weights(kind: ErrorWeights, target: Tensor, sources: Tensor) -> Tensor:
    """Weights ``[tokens]`` of errors, whose squares have mean 1.

    The routed output is several times larger on some texts than on others: errors as they are (``none``) are mostly
    those of these texts. ``sequence`` lets every sequence count alike, ``source`` every file or data set.

    Args:
        target: what errors are errors of, float32 ``[tokens, hidden]``.
        sources: of every sequence, int64 ``[sequences]``; sequences have equal length and follow each other.
    """
    if kind == "none" or not len(sources):
        return torch.ones(len(target), device=target.device)
    energy = target.square().sum(1).view(len(sources), -1).mean(1)
    if kind == "source":
        _, place, count = sources.to(energy.device).unique(return_inverse=True, return_counts=True)
        energy = (torch.zeros_like(count, dtype=energy.dtype).index_add_(0, place, energy) / count)[place]
    weight = energy.clamp(min=1e-12 * float(energy.mean()) + TINY).rsqrt()
    weight = weight / weight.square().mean().sqrt()
    return weight.repeat_interleave(len(target) // len(sources))
