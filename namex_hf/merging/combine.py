"""The merge of a group: one expert, and one router row."""

from dataclasses import dataclass
from typing import Any

import torch

from ..recipe import Grouped
from .experts import Expert, Experts, by_projection, each_projection, games_of, grams, weighted_sum
from .grouping import Groups
from .record import game_records
from .weightings import FALLBACK, WEIGHTINGS, ExpertStatistics, Weights


def shares(
    gram: torch.Tensor, merge: Grouped, precision: torch.dtype, statistics: ExpertStatistics | None = None
) -> Weights:
    """Weights of the members of one group, on the simplex, the base included.

    The group's first member is the base of the game: its own domain vector is zero, so it has no stake and the bargain
    gives it nothing. It gets the share 1/n of a plain mean, and the others divide the rest by the bargain. Otherwise a
    group of two would become its second member. A game without agreement falls back to uniform weights, recorded as
    ``uniform_fallback``.

    Args:
        gram: float64 ``[games, n, n]`` of the members' domain vectors around the first.
        statistics: None without calibration text.
    """
    weighting = merge.weights_by or "uniform"
    solution = WEIGHTINGS[weighting](gram, merge.game, precision, statistics)
    if weighting != "nash":
        return solution
    size = gram.shape[-1]
    values, status = solution.values * (size - 1) / size, list(solution.status)
    values[:, 0] += 1 / size
    for index, word in enumerate(solution.status):
        if word != "agreement":
            values[index], status[index] = 1 / size, FALLBACK
    return Weights(values, tuple(status), solution.residual, solution.iterations)


@dataclass(frozen=True)
class Group:
    """The members of a group, and their shares."""

    members: tuple[int, ...]
    shares: torch.Tensor  # float64 [games, n]
    record: list[dict[str, Any]]  # one a game; none for a group of one


def play(experts: Experts, members: tuple[int, ...], merge: Grouped, device: str) -> Group:
    """The shares of one group's members by their game. A group of one plays no game.

    Raises:
        NotFiniteError: a member holds NaN or infinity.
    """
    granularity = merge.game.granularity
    if len(members) == 1:
        return Group(members, torch.ones(len(games_of(granularity)), 1, dtype=torch.float64), [])
    inside = experts.subset(members)
    gram = grams(inside, inside.expert(0), granularity, device)
    weights = shares(gram, merge, experts.dtype)
    records = game_records(gram, weights, granularity)
    return Group(members, weights.values, [{"members": list(members), **one} for one in records])


def merged_expert(experts: Experts, group: Group, merge: Grouped, device: str, factor: float = 1.0) -> Expert:
    """The one expert of a group, in the experts' dtype; a group of one is its expert, bit for bit.

    Args:
        factor: on ``down_proj``, of groups of more than one.

    Memory: the expert, and chunks.
    """
    if len(group.members) == 1:
        # A copy: the layer's memory may be filled again before this expert is written.
        return experts.expert(group.members[0]).map(torch.clone)
    inside, of_game = experts.subset(group.members), by_projection(group.shares, merge.game.granularity)

    def merged(name: str) -> torch.Tensor:
        return weighted_sum(inside[name], of_game[name], factor if name == "down_proj" else 1.0, device)

    return each_projection(merged, experts)


def averages(values: torch.Tensor, groups: Groups, mass: torch.Tensor | None = None) -> torch.Tensor:
    """Means ``[K, ...]`` of the groups' rows in ``values [N, ...]``, weighted by ``mass [N]`` where there is some.

    A softmax over K rows cannot be the sum of its members' probabilities, so this is a start, not an equivalent.
    """
    means = []
    for group in map(list, groups):
        rows, own = values[group].float(), None if mass is None else mass[group]
        means.append(rows.mean(0) if own is None or not own.sum() > 0 else (own / own.sum()).float() @ rows)
    return torch.stack(means).to(values)


def average_bias(bias: torch.Tensor | None, groups: Groups, mass: torch.Tensor | None = None) -> torch.Tensor | None:
    """`averages` of a gate's correction bias, in the shape ``[..., K]`` and dtype of ``bias``."""
    return None if bias is None else averages(bias.flatten(), groups, mass).view(*bias.shape[:-1], len(groups))
