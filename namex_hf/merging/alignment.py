"""Neurons of SwiGLU experts in a common order.

An expert computes the same whatever the order of its neurons: one permutation acts on the rows of gate and up and on
the columns of down. Before experts are averaged each is brought into the order that fits a reference expert best, by
linear assignment (Ainsworth et al. 2023, for the SwiGLU form).
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from .experts import Expert, Experts, ExpertWeights, NotFiniteError
from .routing import Activation, TokenRouting, neurons

ALIGNMENT_TOKENS = 4096


def permuted(expert: Expert, order: torch.Tensor) -> Expert:
    """The expert with its neurons in another order: the same function.

    Args:
        order: int64 ``[width]``; neuron ``order[n]`` goes to place n.
    """
    return ExpertWeights.of(lambda name: permuted_matrix(name, expert[name], order), expert)


def permuted_matrix(name: str, matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """One tensor of `permuted`, by its name."""
    if name == "down_proj.bias":
        return matrix
    return matrix[:, order] if name == "down_proj" else matrix[order]


def order_by_weights(reference: Expert, expert: Expert) -> torch.Tensor:
    """The order in which an expert's neurons are most like the reference's: cosines of gate row, up row, down column.

    Each of the three counts alike, whatever its norm.
    """

    def directions(one: Expert) -> torch.Tensor:
        rows = [matrix.T if name == "down_proj" else matrix for name, matrix in one.items()]
        return torch.cat([normalize(part.float(), dim=1) for part in rows], dim=1)

    return _assignment(directions(reference) @ directions(expert).T)


def order_by_activations(
    reference: Expert, expert: Expert, inputs: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """The order in which an expert's neurons correlate most with the reference's on common inputs.

    Args:
        inputs: float32 ``[tokens, hidden]``; a neuron that never varies on them correlates with none.
    """
    return _assignment(
        _standardised(neurons(inputs, reference, activation)).T @ _standardised(neurons(inputs, expert, activation))
    )


def _standardised(values: torch.Tensor) -> torch.Tensor:
    return normalize(values - values.mean(0), dim=0)


def _assignment(likeness: torch.Tensor) -> torch.Tensor:
    """For every row the column it is matched with, so that the sum is largest."""
    _, columns = linear_sum_assignment(likeness.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(likeness.device)


def layer_orders(
    experts: Experts, align: str, inputs: torch.Tensor, routing: TokenRouting, activation: Activation
) -> torch.Tensor:
    """Orders of neurons of all experts of a layer, to match the most used one, int64 ``[experts, width]`` on the CPU.

    Args:
        align: ``none``, ``weights``, ``activations``.
        inputs: float32 ``[tokens, hidden]``; of these `ALIGNMENT_TOKENS` at most are taken.

    Memory: two experts in float32, and their activations on those tokens.

    Raises:
        NotFiniteError: an expert holds NaN or infinity.
    """
    count = experts.count
    orders = torch.arange(len(experts.up[0])).repeat(count, 1)
    if align == "none":
        return orders
    sample = inputs[:: max(1, -(-len(inputs) // ALIGNMENT_TOKENS))]
    first = int(routing.mass(count).argmax())

    def finite(number: int) -> Expert:
        expert = experts.expert(number).to(inputs)
        for name, matrix in expert.items():
            if not matrix.isfinite().all():
                raise NotFiniteError(number, name)
        return expert

    reference = finite(first)
    for number in range(count):
        if number == first:
            continue
        if align == "weights":
            orders[number] = order_by_weights(reference, finite(number)).cpu()
        else:
            orders[number] = order_by_activations(reference, finite(number), sample, activation).cpu()
    return orders


def reorder(experts: Experts, orders: torch.Tensor) -> None:
    """Bring every expert's neurons into its order ``[width]``, in place."""
    for number, order in enumerate(orders):
        experts.set_expert(number, permuted(experts.expert(number), order))
