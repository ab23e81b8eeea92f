"""Which experts become one: average linkage over the cosines of their weights."""

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from ..bargaining import cosine

Groups = tuple[tuple[int, ...], ...]


def groups_by_weights(gram: torch.Tensor, count: int) -> Groups:
    """Exactly ``count`` groups of experts, by hierarchical clustering with average linkage of 1 - cosine.

    Args:
        gram: float64 ``[N, N]``, of whole experts.
        count: from 1 to N.

    Returns:
        Groups in the order of their first members, members ascending.
    """
    number = len(gram)
    if count == number:
        return tuple((index,) for index in range(number))
    distance = (1 - cosine(gram)).clamp(min=0).fill_diagonal_(0)
    distance = (distance + distance.T) / 2
    tree = linkage(squareform(distance.numpy(), checks=False), "average")
    labels = cut_tree(tree, n_clusters=count)[:, 0]  # by the number of merges: exact whatever the ties
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(index)
    return tuple(tuple(members) for members in groups.values())
