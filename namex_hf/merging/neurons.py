"""Which neurons of an expert stay, and its down matrix refitted to them.

For the tokens of an expert let z be the gate value times what its down matrix D receives, ``[width]``, and
``H = sum_t z_t z_t^T`` plus a ridge. The expert's part of the layer's output is D z. Without the neurons outside a set
S it is nearest to that under ``D H[:, S] H[S, S]^-1``.
"""

import math

import torch
from torch import Tensor

from ..recipe.choices import Neurons
from .curvature import with_ridge

RIDGE = 1e-2
"""Added to H, relative to the mean of its diagonal."""
ROUNDS = 64
"""Rounds in which all neurons of an expert would go: one neuron a round where there are no more than these."""


def neurons_that_stay(
    moment: Tensor,
    down: Tensor,
    width: int,
    neurons: Neurons,
    always: Tensor | None = None,
    seed: int = 0,
    scores: Tensor | None = None,
) -> Tensor:
    """Numbers of the neurons that stay, ascending, int64 ``[width]``.

    ``energy``: those of the largest ``H_jj |d_j|^2``. ``second_order``: the neuron goes whose loss is least while the
    others' downs make up for it, ``|d_j|^2 / [H^-1]_jj`` (Hassibi & Stork 1993); then D and H^-1 are those of the rest,
    and so on. ``gradient``: those of the largest ``scores``. ``random``: a control.

    Args:
        moment: H with its ridge, float64 ``[all, all]``.
        down: D, ``[hidden, all]``.
        always: numbers of at most ``width`` neurons that stay whatever their loss, ascending.
        seed: of ``random``, from 0 to 2**63 - 1.
        scores: of ``gradient``, ``[all]``.

    Memory: three times ``moment``, and twice in float32, under ``second_order``.
    """
    if always is not None and len(always) == width:
        return always
    stays = torch.zeros(len(moment), dtype=torch.bool, device=moment.device)
    stays[[] if always is None else always] = True
    if neurons != "second_order":
        if neurons == "energy":
            scores = moment.diagonal() * down.double().square().sum(0)
        elif neurons == "random":
            scores = torch.rand(len(moment), generator=torch.Generator().manual_seed(seed)).to(moment.device)
        assert scores is not None
        return scores.masked_fill(stays, math.inf).topk(width).indices.sort().values
    # In place and at full size: rows of neurons that are gone become zeros. float32 chooses as float64 does.
    products = down.float().T @ down.float()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment)).float()
    is_gone = torch.zeros(len(moment), dtype=torch.bool, device=moment.device)
    at_once, left = max(1, len(moment) // ROUNDS), len(moment)
    while left > width:
        losses = (products.diagonal() / inverse.diagonal()).masked_fill(is_gone | stays, math.inf)
        gone = losses.topk(min(at_once, left - width), largest=False).indices
        rows, cross = inverse[gone], products[gone]
        moved = torch.linalg.solve(rows[:, gone], rows)  # of the downs of all others
        cross -= cross[:, gone] @ moved / 2
        inverse.addmm_(rows.T, moved, alpha=-1)
        products.addmm_(cross.T, moved, alpha=-1).addmm_(moved.T, cross, alpha=-1)
        is_gone[gone], left = True, left - len(gone)
    return (~is_gone).nonzero().flatten()


def refitted(moment: Tensor, down: Tensor, stay: Tensor) -> Tensor:
    """``D H[:, S] H[S, S]^-1``, float64 ``[hidden, len(stay)]``. Args: as `neurons_that_stay`."""
    product = down.double() @ moment[:, stay]
    return torch.cholesky_solve(product.T, torch.linalg.cholesky(moment[stay][:, stay])).T


def ridged(moment: Tensor) -> Tensor:
    """H with its ridge, float64. Args: moment, of `Moments.of`."""
    return with_ridge(moment.double(), RIDGE)
