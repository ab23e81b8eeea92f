"""Which neurons of an expert stay, and its down matrix refitted to them.

For the tokens of an expert let z be the gate value times what its down matrix D receives, ``[width]``, and
``H = sum_t z_t z_t^T`` plus a ridge. The expert's part of the layer's output is D z. Without the neurons outside a set
S it is nearest to that under ``D H[:, S] H[S, S]^-1``.
"""

import torch
from torch import Tensor

from ..recipe.choices import Neurons
from .curvature import with_ridge

RIDGE = 1e-2
"""Added to H, relative to the mean of its diagonal."""
ROUNDS = 64
"""Rounds in which all neurons of an expert would go: one neuron a round where there are no more than these."""


def neurons_that_stay(moment: Tensor, down: Tensor, width: int, neurons: Neurons) -> Tensor:
    """Numbers of the neurons that stay, ascending, int64 ``[width]``.

    ``energy``: those of the largest ``H_jj |d_j|^2``. ``second_order``: the neuron goes whose loss is least while the
    others' downs make up for it, ``|d_j|^2 / [H^-1]_jj`` (Hassibi & Stork 1993); then D and H^-1 are those of the rest,
    and so on.

    Args:
        moment: H with its ridge, float64 ``[all, all]``.
        down: D, ``[hidden, all]``.

    Memory: three times ``moment`` under ``second_order``.
    """
    products = down.double().T @ down.double()
    if neurons == "energy":
        return (moment.diagonal() * products.diagonal()).topk(width).indices.sort().values
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    count = len(moment)
    left, at_once = torch.arange(count, device=moment.device), max(1, count // ROUNDS)
    while len(left) > width:
        losses = products.diagonal() / inverse.diagonal()
        gone = losses.topk(min(at_once, len(left) - width), largest=False).indices
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[gone] = False
        moved = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stays])  # of the downs that stay
        inverse = inverse[stays][:, stays] - inverse[stays][:, gone] @ moved
        cross = products[gone][:, stays]
        mixed = cross.T @ moved
        products = products[stays][:, stays] - mixed - mixed.T + moved.T @ products[gone][:, gone] @ moved
        left = left[stays]
    return left


def refitted(moment: Tensor, down: Tensor, stay: Tensor) -> Tensor:
    """``D H[:, S] H[S, S]^-1``, float64 ``[hidden, len(stay)]``. Args: as `neurons_that_stay`."""
    product = down.double() @ moment[:, stay]
    return torch.cholesky_solve(product.T, torch.linalg.cholesky(moment[stay][:, stay])).T


def ridged_moment(activations: Tensor) -> Tensor:
    """H with its ridge, summed in the activations' dtype, float64 ``[all, all]``. Args: activations, z."""
    return with_ridge((activations.T @ activations).double(), RIDGE)
