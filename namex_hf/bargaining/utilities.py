"""What a step is worth to each player, and how much of that the others bring (Nguyen et al., eq. 8 and 10, Figure 11).

The utility of player j under a step Delta = sum_i w_i tau_i is u_j = tau_j . Delta = (K w)_j, and |Delta|^2 = w . K w.
All that is here follows from the Gram matrix K of the domain vectors tau and the weights w.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from .gram import cosine
from .nash import AGREEMENT, nash_bargaining

FLAT = 1e-9
"""Least eigenvalue of cosines: domain vectors in one plane span an ellipsoid that is flat."""
TRIPLES_AT_ONCE = 1 << 15
"""Games of three that are solved in one batch: 64 players have 41,664."""


def interaction(gram: Tensor, weights: Tensor) -> Tensor:
    """The sum of eq. 10 for every player, N w_j sum_{i != j} w_i tau_i . tau_j / |Delta|^2: a pure number.

    It does not depend on the scale of the weights. For the Nash weights (zero disagreement point, equal power) it is
    alpha_j times the sum of eq. 10, which then says that (alpha_j |tau_j|)^2 plus this is 1 for every player: the share
    of the player's utility 1 / alpha_j that the others bring. Above 0 the others help player j, below 0 they hamper it.

    Args:
        gram: [..., N, N].
        weights: [..., N], raw or on the simplex.

    Returns:
        [..., N]; zeros where there is no step.
    """
    utility = (gram @ weights[..., None])[..., 0]
    square = (weights * utility).sum(-1, keepdim=True)
    others = utility - weights * gram.diagonal(dim1=-2, dim2=-1)
    found = weights.shape[-1] * weights * others / square
    return torch.where(square > 0, found, torch.zeros_like(found))


def aligned_utilities(gram: Tensor, weights: Tensor) -> Tensor:
    """Utilities of a step of length 1 in units of |tau_j|, the cosines between tau_j and Delta: [..., N] in [-1, 1].

    Args:
        gram: [..., N, N], every player with a stake (a positive diagonal).
        weights: [..., N], of a step that is not zero.
    """
    utility = (gram @ weights[..., None])[..., 0]
    length = (weights * utility).sum(-1, keepdim=True).sqrt()
    return utility / length / gram.diagonal(dim1=-2, dim2=-1).sqrt()


def furthest_gains(gram: Tensor, directions: Tensor) -> Tensor:
    """What a step of length 1 within the span of three domain vectors gives them at most, in units of |tau_j|.

    All such gains are the ellipsoid u C^-1 u = 1, with C the cosines of the domain vectors: the unit sphere where these
    are orthogonal.

    Args:
        gram: [3, 3].
        directions: of gains, [..., 3], of any length but 0.

    Returns:
        [..., 3], the points of the ellipsoid in these directions.
    """
    values, vectors = torch.linalg.eigh(cosine(gram))
    inverse: Tensor = vectors @ torch.diag(1 / values.clamp(min=FLAT)) @ vectors.T
    return directions / ((directions @ inverse) * directions).sum(-1, keepdim=True).sqrt()


@dataclass(frozen=True)
class Three:
    """A game of three of the players."""

    players: tuple[int, int, int]
    gram: Tensor  # float64 [3, 3]
    weights: Tensor  # float64 [3], Nash, summing to 1
    cosine: float  # between the Nash step and the plain mean's


def three_most_apart(gram: Tensor) -> Three | None:
    """The three players whose Nash step, in a game of their own, differs most from their plain mean's.

    Args:
        gram: float64 [N, N].

    Returns:
        None where no three players have a stake and agree.
    """
    players = gram.diagonal().nonzero().flatten().tolist()
    triples = torch.tensor(list(combinations(players, 3)), dtype=torch.long)
    found: list[Three] = []
    for some in torch.split(triples, TRIPLES_AT_ONCE) if len(triples) else ():
        grams = gram[some[:, :, None], some[:, None, :]]
        solution = nash_bargaining(grams)
        agreed = torch.tensor([word == AGREEMENT for word in solution.status])
        if not agreed.any():
            continue
        some, grams, weights = some[agreed], grams[agreed], solution.weights[agreed]
        weights = weights / weights.sum(-1, keepdim=True)
        step = (weights * (grams @ weights[..., None])[..., 0]).sum(-1)
        mean = grams.mean((-2, -1))
        toward = (weights * grams.mean(-1)).sum(-1) / (step * mean).clamp(min=torch.finfo(mean.dtype).tiny).sqrt()
        at = int(toward.argmin())
        first, second, third = some[at].tolist()
        found.append(Three((first, second, third), grams[at], weights[at], float(toward[at])))
    return min(found, key=lambda one: one.cosine, default=None)
