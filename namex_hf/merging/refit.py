"""``down_proj`` refitted in closed form, on the activations that the merged gate and up really produce.

The calibrated mean of the downs (`curvature`) assumes that a merged expert's neurons answer as each member's did. They
do not: gate and up have changed, and the activation function bends the difference. Down is linear in what they do
produce, so the best one is a least-squares problem.
"""

from collections.abc import Callable

import torch

from .curvature import with_ridge
from .experts import Expert
from .routing import Activation, Routing, neurons, routed_output


def refitted_down(
    down: torch.Tensor, produced: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor, ridge: float
) -> torch.Tensor:
    """The D that makes ``sum_t w_t^2 |D h_t - y_t|^2 + ridge |D - down|^2`` least, float64.

    Args:
        down: where the tokens say nothing, ``[hidden, width]``.
        produced: h, ``[tokens, width]``.
        wanted: y, ``[tokens, hidden]``.
        weight: w, ``[tokens]``.
        ridge: relative to the mean of the diagonal of ``sum_t w_t^2 h_t h_t^T``.

    Memory: three matrices in float64 beyond the result.
    """
    heavy = produced * weight.square()[:, None]
    moment = (heavy.T @ produced).double()
    solid = with_ridge(moment, ridge)
    product = (wanted.T @ heavy).double() + down.double() * (solid - moment).diagonal()
    return torch.cholesky_solve(product.T, torch.linalg.cholesky(solid)).T


def refit_downs(
    inputs: torch.Tensor,
    routing: Routing,
    experts: int,
    expert: Callable[[int], Expert],
    wanted: torch.Tensor,
    activation: Activation,
    ridge: float,
    sweeps: int,
    weight: torch.Tensor,
    keep: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Fit all downs of a layer to its routed output, one expert after the other on what the others leave over.

    ``sum_t w_t^2 |sum_k g_tk D_k h_tk - y_t|^2`` is least squares in all D_k together; this is block coordinate
    descent on it, so no sweep makes it worse, but for rounding: the ridge holds on to the down as it stands.

    Args:
        inputs: ``[tokens, hidden]``.
        routing: of the layer's own new router.
        expert: the float32 matrices of one of the experts as they stand.
        wanted: y, the original layer's routed output ``[tokens, hidden]``.
        weight: w, ``[tokens]``.
        keep: takes each new down and gives it back as it is kept, rounded, in float32.

    Returns:
        The layer's routed output with the new downs, ``[tokens, hidden]``.

    Memory: that output, one expert, and its tokens.
    """
    output = routed_output(inputs, routing, experts, expert, activation)
    for _ in range(sweeps):
        for number in range(experts):
            token, gate = routing.of(number)
            if not len(token):
                continue
            matrices = expert(number)
            old = matrices.down.clone()  # what `keep` fills may be the same memory
            produced = neurons(inputs[token], matrices, activation)
            heard = gate[:, None] * produced
            missing = wanted[token] - output[token] + heard @ old.T
            new = keep(number, refitted_down(old, heard, missing, weight[token], ridge))
            output.index_add_(0, token, heard @ (new - old).T)
    return output
