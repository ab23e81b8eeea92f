"""NAMEx: the Nash bargaining solution over domain vectors (paper Lemma 3.2)."""

import torch

from ...bargaining import nash_bargaining
from .weighting import Weights


def weighting(gram: torch.Tensor, disagreement: str, scale: str, precision: torch.dtype) -> Weights:
    """Solve K a = 1/a (zero disagreement point) or K a = 1/a + d (mean), one game a leading index.

    The mean point gives every player what the step of the plain mean gives it, d = K 1/N, in units where the mean of
    |tau|^2 is 1. The unit is a free choice that interpolates between the Nash step and the plain mean; the weights are
    returned in the units of ``gram``.

    Args:
        scale: ``simplex`` divides a game's weights by their sum (paper C.3); ``lemma`` keeps the raw solution.
    """
    count = gram.shape[-1]
    unit = gram.diagonal(dim1=-2, dim2=-1).mean(-1).sqrt()
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))[:, None]
    scaled = gram / unit[..., None] ** 2
    point = scaled.mean(-1) if disagreement == "mean" else None
    solution = nash_bargaining(scaled, disagreement=point, precision=precision)
    values = solution.weights / unit
    if scale == "simplex":
        total = values.sum(-1, keepdim=True)
        values = torch.where(total > 0, values / total, values)
    assert values.shape[-1] == count
    return Weights(
        values,
        tuple(solution.status),
        tuple(torch.as_tensor(solution.residual).flatten().tolist()),
        tuple(torch.as_tensor(solution.iterations).flatten().expand(len(gram)).tolist()),
    )
