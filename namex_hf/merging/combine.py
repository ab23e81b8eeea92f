"""One expert out of a group, and one router row out of its rows."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .experts import PROJECTIONS, Base, Experts, games_of, grams, weighted_step
from .grouping import Groups
from .record import game_record
from .weightings import WEIGHTINGS, Bargain, Weights


@dataclass(frozen=True)
class Combination:
    """How the members of a group become one."""

    weighting: str = "nash"
    rules: Bargain = field(default_factory=Bargain)
    device: str = "cpu"


def shares(gram: torch.Tensor, choice: Combination, precision: torch.dtype) -> Weights:
    """Weights of the members of one group, on the simplex, the base included.

    The game is played around the group's first member, which is its base: its own domain vector is zero, so it has no
    stake and the bargain gives it nothing. It keeps the share 1/n that it has in a plain mean, and the others divide
    the rest by the bargain. Otherwise a group of two would be its second member. A game without agreement falls back
    to uniform weights, recorded as ``uniform_fallback``.

    Args:
        gram: float64 ``[games, n, n]`` of the members' domain vectors around the first.
    """
    found = WEIGHTINGS[choice.weighting](gram, choice.rules, precision)
    if choice.weighting == "uniform":
        return found
    size = gram.shape[-1]
    values, status = found.values * (size - 1) / size, list(found.status)
    values[:, 0] += 1 / size
    for index, word in enumerate(found.status):
        if word != "agreement":
            values[index], status[index] = 1 / size, "uniform_fallback"
    return Weights(values, tuple(status), found.residual, found.iterations)


def merge_group(
    experts: Experts, members: tuple[int, ...], choice: Combination
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The merged expert of one group, in the experts' dtype, with a record a game.

    A group of one is its expert, bit for bit, and plays no game.

    Memory: one expert in float32 and one in its dtype.
    """
    if len(members) == 1:
        return {name: experts[name][members[0]] for name in PROJECTIONS}, []
    inside = {name: [experts[name][member] for member in members] for name in PROJECTIONS}
    base: Base = {name: inside[name][0].float() for name in PROJECTIONS}
    gram = grams(inside, base, choice.rules.granularity, choice.device)
    weights = shares(gram, choice, inside["gate_proj"][0].dtype)
    merged, games = {}, games_of(choice.rules.granularity)
    for index, game in enumerate(games):
        for name in game:
            step = weighted_step(inside[name], base[name], weights.values[index], choice.device)
            merged[name] = (base[name] + step).to(inside[name][0].dtype)
    return merged, [game_record(game, gram[index], weights, index) for index, game in enumerate(games)]


def average_rows(router: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Router rows ``[K, hidden]`` of the groups: means of their members' rows, in the router's dtype.

    A softmax over K rows cannot be the sum of its members' probabilities, so this is a start, not an equivalent.
    """
    rows = [
        router[list(group)].float().mean(0).to(router.dtype) if len(group) > 1 else router[group[0]] for group in groups
    ]
    return torch.stack(rows)
