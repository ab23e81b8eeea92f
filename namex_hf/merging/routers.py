"""A pretrained linear router as others: cosine (X-MoE, Chi et al. 2022), by token id (StableMoE, Dai et al. 2022)."""

import math
from typing import Any

import torch

from .routing import TokenRouting

STEPS = 60
"""Halvings of the interval in which the logarithm of a scale lies: down to the last bit of a float64."""
SHARPEST = math.log(1e6)


def cosine_form(router: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Projection P and expert embeddings e of a cosine router: ``P h . e_i = W_i h`` until one is trained.

    The rows of P are an orthonormal basis of all that the router sees of h, so no direction of W is lost and none is
    added: with W = U S V^T, P = V^T and e = U S.

    Args:
        router: W, ``[experts, hidden]``.

    Returns:
        float32 ``[rank, hidden]`` and ``[experts, rank]``, rank = min(experts, hidden).
    """
    left, values, right = torch.linalg.svd(router.double().cpu(), full_matrices=False)
    return right.float(), (left * values).float()


def cosines(inputs: torch.Tensor, projection: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """``cos(P h, e_i)``, float32 ``[tokens, experts]``."""
    projected = inputs @ projection.to(inputs).T
    return (
        torch.nn.functional.normalize(projected, dim=-1)
        @ torch.nn.functional.normalize(embeddings.to(inputs), dim=-1).T
    )


def scale_by_norms(router: torch.Tensor, norm: torch.Tensor) -> float:
    """The scale 1/t of a cosine router without data: ``mean_i |W_i| E|P h|``.

    That gives logits the size that they have on average, where |W_i| |P h| gives each the size that it has. What a
    cosine router divides by is |P h|, so it is that, not |h|, whose mean belongs here. h is the output of the norm
    before the router: its direction is taken as uniform, so E|P h|^2 = |P diag(norm)|^2.

    Args:
        router: ``[experts, hidden]``.
        norm: ``[hidden]``, the weight of the norm whose output the router reads.
    """
    projection, _ = cosine_form(router)
    return float(router.float().norm(dim=1).mean() * (projection * norm.float()).norm())


def mean_entropy(logits: torch.Tensor, scale: float = 1.0) -> float:
    """Of ``softmax(scale * logits)`` over the tokens, in nats."""
    chances = (scale * logits.float()).log_softmax(-1)
    return float(-(chances.exp() * chances).sum(-1).mean(dtype=torch.float64))


def scale_by_entropy(logits: torch.Tensor, cosines: torch.Tensor) -> float:
    """The scale 1/t at which a cosine router has the mean entropy of the linear one over the tokens.

    The entropy of every token falls as the scale rises, so halving finds it. Where no scale is
    sharp enough the sharpest is taken.

    Args:
        logits: of the linear router, ``[tokens, experts]``.
        cosines: ``[tokens, experts]``.
    """
    target = mean_entropy(logits)
    low, high = -SHARPEST, SHARPEST
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(cosines, math.exp(middle)) > target else (low, middle)
    return math.exp(high)


def assignment(ids: torch.Tensor, routing: TokenRouting, experts: int, vocabulary: int) -> torch.Tensor:
    """Which experts every token id gets: those that the router chose for it most often.

    StableMoE distils the router into a student that sees the id alone, by cross-entropy against the expert that was
    chosen; here, where k are, against each of them with weight 1/k. A student with a logit for every id and expert has
    its minimum where its softmax is the share of each expert among the id's choices, so its top-k are the experts
    chosen most often, and no descent is needed to find them. Ties go to the larger sum of gate values.

    Args:
        ids: ``[tokens]``.
        routing: of these tokens.

    Returns:
        int32 ``[vocabulary, top_k]``, by falling count; -1 throughout for an id that is not among them.

    Memory: twice ``[ids that occur, experts]`` in float64.
    """
    unique, place = ids.unique(return_inverse=True)
    top_k, tokens = routing.index.shape[1], place.bincount(minlength=len(unique))
    cells = (place[:, None] * experts + routing.index).flatten()
    counts = cells.bincount(minlength=len(unique) * experts).view(len(unique), experts).double()
    mass = cells.bincount(routing.value.flatten().double(), minlength=len(unique) * experts).view(len(unique), experts)
    table = torch.full((vocabulary, top_k), -1, dtype=torch.int32, device=ids.device)
    # A sum of gate values is at most the number of tokens: below one, it decides between equal counts alone.
    table[unique] = (counts + mass / (tokens[:, None] + 1)).topk(top_k, dim=-1).indices.to(torch.int32)
    return table


def overlap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """What share of every token's experts two routings have in common, float32 ``[tokens]``.

    Args:
        one, other: experts of every token, ``[tokens, top_k]``, no expert twice.
    """
    return (one[:, :, None] == other[:, None, :]).any(-1).float().mean(-1)


def entropy(counts: torch.Tensor) -> float:
    """Entropy of shares ``[N]`` over that of equal shares: 1 balanced, 0 all on one; 1 for a single expert."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum() / math.log(len(counts))) if len(counts) > 1 else 1.0


def load_entropy(index: torch.Tensor, experts: int) -> float:
    """`entropy` of the experts' shares of all slots. Args: index, experts of every token, ``[tokens, top_k]``."""
    return entropy(index.flatten().bincount(minlength=experts).double())


def comparison(linear: torch.Tensor, chosen: torch.Tensor, experts: int) -> dict[str, Any]:
    """How a routing differs from the linear one on the same inputs, as plain values.

    Args:
        linear, chosen: experts of every token, ``[tokens, top_k]``, the first the one with the largest value or, under
            ``stable``, the one chosen most often.
    """
    return {
        "agreement": float(overlap(linear, chosen).mean()),
        "agreement_first": float((linear[:, 0] == chosen[:, 0]).float().mean()),
        "load_entropy_linear": load_entropy(linear, experts),
        "load_entropy": load_entropy(chosen, experts),
    }
