"""Each player's utility of a step, and the share that comes from the others (Nguyen et al., eq. 8 and 10, Figure 11).

The utility of player j under a step Delta = sum_i w_i tau_i is u_j = tau_j . Delta = (K w)_j, and |Delta|^2 = w . K w.
Every function needs only the Gram matrix K of the domain vectors tau and the weights w.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from .gram import cosine
from .nash import AGREEMENT, nash_bargaining

FLAT = 1e-9
"""Least eigenvalue of the cosines: three domain vectors in a plane have one of 0, and a flat ellipsoid."""
TRIPLES_AT_ONCE = 1 << 15
"""Games of three players in one batch; 64 players have 41,664 such games."""


def interaction(gram: Tensor, weights: Tensor) -> Tensor:
    """The sum of eq. 10 for every player, N w_j sum_{i != j} w_i tau_i . tau_j / |Delta|^2: a pure number.

    It does not depend on the scale of the weights. For the Nash weights (zero disagreement point, equal power) it is
    alpha_j times the sum of eq. 10, and (alpha_j |tau_j|)^2 plus it is 1 for every player. So it is the share of the
    player's utility 1 / alpha_j that comes from the others. Above 0 they help player j, below 0 they hamper it.

    Args:
        gram: [..., N, N].
        weights: [..., N], raw or on the simplex.

    Returns:
        [..., N]; zeros where the step is zero.
    """
    utility = (gram @ weights[..., None])[..., 0]
    square = (weights * utility).sum(-1, keepdim=True)
    others = utility - weights * gram.diagonal(dim1=-2, dim2=-1)
    share = weights.shape[-1] * weights * others / square
    return torch.where(square > 0, share, torch.zeros_like(share))


def aligned_utilities(gram: Tensor, weights: Tensor) -> Tensor:
    """Cosines between tau_j and Delta, [..., N] in [-1, 1]: the utilities of a step of length 1 in units of |tau_j|.

    Args:
        gram: [..., N, N], every player with a stake (a positive diagonal).
        weights: [..., N]; their step must not be zero.
    """
    utility = (gram @ weights[..., None])[..., 0]
    length = (weights * utility).sum(-1, keepdim=True).sqrt()
    return utility / length / gram.diagonal(dim1=-2, dim2=-1).sqrt()


def furthest_gains(gram: Tensor, directions: Tensor) -> Tensor:
    """Largest gains of three players from a step of length 1 in the span of their domain vectors, in units of |tau_j|.

    These gains form the ellipsoid u C^-1 u = 1, with C the cosines of the domain vectors. It is the unit sphere if they
    are orthogonal.

    Args:
        gram: [3, 3].
        directions: directions of the gains, [..., 3], of any length but 0.

    Returns:
        [..., 3], the points of the ellipsoid in these directions.
    """
    values, vectors = torch.linalg.eigh(cosine(gram))
    inverse: Tensor = vectors @ torch.diag(1 / values.clamp(min=FLAT)) @ vectors.T
    return directions / ((directions @ inverse) * directions).sum(-1, keepdim=True).sqrt()


@dataclass(frozen=True)
class ThreePlayerGame:
    """A game between three of the players."""

    players: tuple[int, int, int]
    gram: Tensor  # float64 [3, 3]
    weights: Tensor  # float64 [3], Nash, summing to 1
    cosine: float  # between the Nash step and the plain mean of the domain vectors


def three_most_apart(gram: Tensor) -> ThreePlayerGame | None:
    """The three players whose Nash step, in a game of their own, differs most from the plain mean of their vectors.

    Args:
        gram: float64 [N, N].

    Returns:
        None where no three players with a stake have an agreement.
    """
    players = gram.diagonal().nonzero().flatten().tolist()
    triples = torch.tensor(list(combinations(players, 3)), dtype=torch.long)
    games: list[ThreePlayerGame] = []
    for chosen in torch.split(triples, TRIPLES_AT_ONCE) if len(triples) else ():
        grams = gram[chosen[:, :, None], chosen[:, None, :]]
        solution = nash_bargaining(grams)
        agreed = torch.tensor([word == AGREEMENT for word in solution.status])
        if not agreed.any():
            continue
        chosen, grams, weights = chosen[agreed], grams[agreed], solution.weights[agreed]
        weights = weights / weights.sum(-1, keepdim=True)
        step = (weights * (grams @ weights[..., None])[..., 0]).sum(-1)
        mean = grams.mean((-2, -1))
        cosines = (weights * grams.mean(-1)).sum(-1) / (step * mean).clamp(min=torch.finfo(mean.dtype).tiny).sqrt()
        least = int(cosines.argmin())
        first, second, third = chosen[least].tolist()
        games.append(ThreePlayerGame((first, second, third), grams[least], weights[least], float(cosines[least])))
    return min(games, key=lambda game: game.cosine, default=None)
