"""``down_proj`` refitted in closed form, on the activations of the merged gate and up.

The calibrated mean of the downs (`curvature`) assumes that the neurons of a merged expert act as each member's did.
They do not: gate and up have changed, and the activation function bends the difference. The output is linear in down,
so the best down is a least-squares problem.
"""

import torch
from torch import Tensor

from .curvature import with_ridge
from .moe_layer import MoELayer
from .routing import TokenRouting, neurons, on_tokens


def refitted_down(down: Tensor, activations: Tensor, target: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """The D that makes ``sum_t w_t^2 |D h_t - y_t|^2 + ridge |D - down|^2`` least, float64.

    Args:
        down: the D of directions without tokens, ``[hidden, width]``.
        activations: h, ``[tokens, width]``.
        target: y, ``[tokens, hidden]``.
        weight: w, ``[tokens]``.
        ridge: relative to the mean of the diagonal of ``sum_t w_t^2 h_t h_t^T``.

    Memory: three matrices in float64 beyond the result.
    """
    weighted = activations * weight.square()[:, None]
    moment = (weighted.T @ activations).double()
    ridged = with_ridge(moment, ridge)
    product = (target.T @ weighted).double() + down.double() * (ridged - moment).diagonal()
    return torch.cholesky_solve(product.T, torch.linalg.cholesky(ridged)).T


def refit_downs(
    layer: MoELayer,
    inputs: Tensor,
    routing: TokenRouting,
    output: Tensor,
    target: Tensor,
    weight: Tensor,
    ridge: float,
    sweeps: int,
) -> None:
    """Fit all downs of a layer to its target in place, each expert to what the others leave over.

    ``sum_t w_t^2 |sum_k g_tk D_k h_tk - y_t|^2`` is least squares in all D_k together. This is block coordinate descent
    on it, so no sweep makes it worse, but for rounding: the ridge holds on to the present down.

    Args:
        inputs: ``[tokens, hidden]``.
        routing: of the inputs, by the layer's own new router.
        output: the layer's routed output ``[tokens, hidden]``; changed in place to that with the new downs.
        target: y, ``[tokens, hidden]``.
        weight: w, ``[tokens]``.

    Memory: one expert, and its tokens.
    """
    for _ in range(sweeps):
        for number in range(layer.experts.count):
            token, gate = routing.of(number)
            if not len(token):
                continue
            expert = layer.experts.expert(number)
            old = expert.down.to(inputs, copy=True)  # `set_down` may fill the same memory
            activations = gate[:, None] * on_tokens(neurons, inputs[token], expert, layer.activation)
            missing = target[token] - output[token] + activations @ old.T
            layer.set_down(number, refitted_down(old, activations, missing, weight[token], ridge))
            new = layer.experts.down[number].to(inputs)  # as rounded
            output.index_add_(0, token, activations @ (new - old).T)
