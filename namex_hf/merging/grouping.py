"""Groups of experts, each of which becomes one expert."""

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from ..bargaining import cosine

Groups = tuple[tuple[int, ...], ...]
"""In the order of their first members, members ascending."""


def groups_by_weights(gram: torch.Tensor, count: int) -> Groups:
    """Exactly ``count`` groups of experts, by average linkage of 1 - cosine of their weights.

    Args:
        gram: float64 ``[N, N]``, of whole experts.
        count: from 1 to N.
    """
    return average_linkage(1 - cosine(gram), count)


def groups_by_outputs(outputs: torch.Tensor, count: int) -> Groups:
    """Average linkage of the distances between mean outputs (HC-SMoE, Chen et al. 2024).

    Args:
        outputs: float64 ``[N, hidden]``, every expert's mean output on the same tokens.
    """
    return average_linkage(torch.cdist(outputs, outputs), count)


def groups_by_router(gates: torch.Tensor, count: int) -> Groups:
    """Average linkage of 1 - correlation of gate values: groups of experts that are chosen for the same tokens.

    Args:
        gates: ``[tokens, N]``, 0 where an expert is not among the top-k.
    """
    centred = gates.double() - gates.double().mean(0)
    return average_linkage(1 - cosine(centred.T @ centred), count)


def average_linkage(distance: torch.Tensor, count: int) -> Groups:
    """Hierarchical clustering with average linkage, cut at ``count`` groups.

    Args:
        distance: ``[N, N]``, of which the part above the diagonal is read; below 0 by rounding is 0.
    """
    number = len(distance)
    if count == number:
        return tuple((index,) for index in range(number))
    tree = linkage(squareform(distance.cpu().clamp(min=0).numpy(), checks=False), "average")
    labels = cut_tree(tree, n_clusters=count)[:, 0]  # by the number of merges: exact whatever the ties
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(index)
    return tuple(tuple(members) for members in groups.values())


def groups_by_damage(gram: torch.Tensor, gates: torch.Tensor, count: int) -> Groups:
    """Join, again and again, the two groups that add least to the error of the layer's output.

    The output of a group g is s_g f_g: f_g is the mean of its members' outputs, weighted by squared gate values e_i,
    and s_g is the sum of their gate values. The error of the layer's output is ``r = sum_i g_i f_i - sum_g s_g f_g``.
    To join a and b changes r by ``c (f_a - f_b)`` with ``c = (s_a e_b - s_b e_a) / (e_a + e_b)``, token by token. The
    change of the squared error,

        sum_t 2 c_t <f_a - f_b, r>_t + c_t^2 |f_a - f_b|_t^2

    follows from inner products alone. Unlike a distance between experts it depends on which are chosen together.

    Args:
        gram: float32 ``[tokens, N, N]``, inner products of the expert outputs on each token.
        gates: float32 ``[tokens, N]``, 0 where an expert is not among the top-k.

    Memory: four times ``gram``.
    """
    weight = gates.square().sum(0)
    weight = weight.clamp(min=1e-9 * float(weight.sum()) + torch.finfo(weight.dtype).tiny)
    total, missed = gates, torch.zeros_like(gates)  # s_g, and <f_g, r>
    groups = [[index] for index in range(len(weight))]
    for _ in range(len(groups) - count):
        change = (total[:, :, None] * weight - total[:, None, :] * weight[:, None]) / (weight[:, None] + weight)
        square = gram.diagonal(dim1=1, dim2=2)
        apart = square[:, :, None] + square[:, None, :] - 2 * gram
        added = (2 * change * (missed[:, :, None] - missed[:, None, :]) + change.square() * apart).sum(0)
        added[torch.ones_like(added, dtype=torch.bool).tril()] = torch.inf
        first, second = divmod(int(added.argmin()), len(groups))
        missed = missed + change[:, first, second, None] * (gram[:, first] - gram[:, second])
        share = float(weight[first] / (weight[first] + weight[second]))
        missed = _joined(missed, 1, first, second, share, 1 - share)
        gram = _joined(_joined(gram, 1, first, second, share, 1 - share), 2, first, second, share, 1 - share)
        total = _joined(total, 1, first, second, 1, 1)
        weight = _joined(weight, 0, first, second, 1, 1)
        groups[first] += groups.pop(second)
    return tuple(tuple(sorted(group)) for group in groups)


def _joined(rows: torch.Tensor, axis: int, first: int, second: int, share: float, other: float) -> torch.Tensor:
    """Two entries of an axis become ``share * first + other * second``, in the place of the first."""
    others = [index for index in range(rows.shape[axis]) if index != second]
    result = rows.index_select(axis, torch.tensor(others, device=rows.device))
    result.select(axis, first).copy_(share * rows.select(axis, first) + other * rows.select(axis, second))
    return result
