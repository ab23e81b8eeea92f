"""Propagation of the base expert from layer to layer (paper eq. 3, 7 and 9), or a base of each layer's own (eq. 2)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..bargaining import NO_AGREEMENT
from ..recipe import AroundBase
from .experts import Expert, Experts, ExpertWeights, by_projection, each_projection, grams, weighted_step
from .momentum import momentum_step
from .record import cosines, game_records
from .weightings import FALLBACK, WEIGHTINGS, Weights

StepOf = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""From a projection, its E_m and the weights ``[N]`` to ``sum_i w_i M_i(tau_i)``, of the base's shape and dtype."""


@dataclass(frozen=True)
class PropagationState:
    """The base expert on arrival at a MoE layer, and what its next step depends on."""

    base: Expert  # E_m, float32, unrounded
    weights: torch.Tensor | None = None  # float64 [games, N], of each game's last solution; zeros without agreement
    momentum: Mapping[str, torch.Tensor] = field(default_factory=dict)  # buffers, float32


@dataclass(frozen=True)
class PropagationStep:
    """Propagation through one layer."""

    state: PropagationState | None  # None: the next layer begins with its own base
    record: list[dict[str, Any]]
    cosines: torch.Tensor  # float32 [games, N, N]
    weights: torch.Tensor | None  # float64 [games, N], with which the step is taken; None: there is no step


def propagate(
    experts: Experts,
    state: PropagationState,
    merge: AroundBase,
    position: int,
    step_of: StepOf | None = None,
    device: str | torch.device = "cpu",
) -> PropagationStep:
    """E_m' = E_m + gamma * sum_i w_i (E_i - E_m), or by way of a momentum buffer (paper eq. 11).

    Every game is solved on its own, see `solve_or_reuse`. Without a weighting (CAMEx, paper eq. 2) cosines and norms
    are recorded, and there is no next state.

    Args:
        experts: the layer's, in their own dtype; read twice, once for the games and once for the step.
        state: after the layer before.
        position: of the layer among the MoE layers.
        step_of: the step where M_i acts in it (paper eq. 3); None: M_i = I. The record is of the games, without M_i.

    Memory: the step and the next base in float32, new momentum buffers, and a chunk of every expert.

    Raises:
        NotFiniteError: an expert holds NaN or infinity.
    """
    gram = grams(experts, state.base, merge.game.granularity, device)
    if merge.weights_by is None:
        return PropagationStep(None, game_records(gram, None, merge.game.granularity), cosines(gram), None)
    weights, reusable = solve_or_reuse(gram, state.weights, merge, position, experts.dtype)
    of_game = by_projection(weights.values, merge.game.granularity)

    def step(name: str) -> torch.Tensor:
        if step_of is not None:
            return step_of(name, state.base[name], of_game[name])
        return weighted_step(experts[name], state.base[name], of_game[name], device)

    choice = merge.propagation
    base, momentum = momentum_step(
        state.base, each_projection(step, experts), state.momentum, choice.gamma, choice.complex_beta
    )
    after = PropagationState(ExpertWeights.of(base.__getitem__, base), reusable, momentum)
    return PropagationStep(after, game_records(gram, weights, merge.game.granularity), cosines(gram), weights.values)


def solve_or_reuse(
    gram: torch.Tensor, earlier: torch.Tensor | None, merge: AroundBase, position: int, precision: torch.dtype
) -> tuple[Weights, torch.Tensor]:
    """The weights of a layer's games, and those that the next layer may reuse.

    A game reuses the weights of its own last agreement, by expert index, in a layer where `AroundBase.solves_at` is
    false. Expert indices of different layers do not correspond; the paper reuses them so. A game without agreement is
    solved again in every layer until there is one. The games of a layer (gate, up and down) may differ in this.

    Without agreement the disagreement point decides. ``zero``: weights 0, so no step, except that of momentum.
    ``mean``: the fallback, the step of the plain mean, weights 1/N with the status `FALLBACK`.

    Args:
        gram: float64 ``[games, N, N]``.
        earlier: float64 ``[games, N]``, the second result of the layer before; None at the first.

    Returns:
        The weights of this layer, and float64 ``[games, N]``: those of agreements, zeros where there is none.
    """
    assert merge.weights_by is not None, "CAMEx has no games"
    reusable = gram.new_zeros(gram.shape[:2]) if earlier is None else earlier.clone()
    due = ~reusable.any(-1) | merge.solves_at(position)
    status = ["reused"] * len(gram)
    residual: list[float | None] = [None] * len(gram)
    iterations: list[int | None] = [None] * len(gram)
    if due.any():
        solution = WEIGHTINGS[merge.weights_by](gram[due], merge.game, precision)
        reusable[due] = solution.values
        for place, index in enumerate(due.nonzero().flatten().tolist()):
            status[index], residual[index] = solution.status[place], solution.residual[place]
            iterations[index] = solution.iterations[place]
    values = reusable.clone()
    if merge.game.disagreement == "mean":
        for index, word in enumerate(status):
            if word == NO_AGREEMENT:
                values[index], status[index] = 1 / values.shape[-1], FALLBACK
    return Weights(values, tuple(status), tuple(residual), tuple(iterations)), reusable
