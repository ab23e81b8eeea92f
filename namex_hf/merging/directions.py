"""Low-rank form of the second moments of a layer's experts: ``c_i = t_i (I + V_i V_i^T)``.

Trace and leading directions are those of the second moment; all other directions have the same energy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.sparse.linalg import eigsh

from .curvature import second_moment
from .experts import Experts
from .routing import Activation, TokenRouting, neurons


@dataclass(frozen=True)
class Leading:
    """One expert's second moment per unit of its gate mass, float64."""

    vectors: torch.Tensor  # [columns, rank], of unit length
    energy: torch.Tensor  # [rank], along them
    rest: float  # mean energy of all other directions

    @classmethod
    def of(cls, moment: torch.Tensor, mass: float, rank: int) -> "Leading":
        """
        Args:
            moment: ``sum_t g_t^2 x_t x_t^T``, ``[columns, columns]``.
            mass: ``sum_t g_t``; 0 without tokens.
            rank: below the number of columns.
        """
        columns = len(moment)
        if mass == 0 or not moment.any():
            return cls(torch.zeros(columns, rank, dtype=torch.float64), torch.zeros(rank, dtype=torch.float64), 0.0)
        matrix = moment.double().cpu().numpy() / mass
        energy, vectors = map(torch.from_numpy, eigsh(matrix, rank, rng=0))  # the same on every run
        rest = (float(moment.double().trace()) / mass - float(energy.sum())) / (columns - rank)
        return cls(vectors, energy.clamp(min=0), max(rest, 0.0))


@dataclass(frozen=True)
class Spans:
    """All experts of a layer, for one kind of matrix."""

    directions: torch.Tensor  # V, [experts, columns, rank]
    floor: torch.Tensor  # t, [experts]; the mean by usage is 1
    explained: float  # share of the experts' energy that lies along the directions


def spans(leading: Sequence[Leading], usage: torch.Tensor, ridge: float) -> Spans:
    """Put experts on one scale.

    Args:
        usage: p, float64 ``[experts]``, summing to 1.
        ridge: added in every direction, relative to the mean energy of all.
    """
    columns, rank = leading[0].vectors.shape
    along = torch.stack([one.energy.sum() for one in leading])
    rest = torch.tensor([one.rest for one in leading], dtype=torch.float64)
    whole = float(usage @ (along + (columns - rank) * rest))
    if whole == 0:  # no token, or none but zeros
        nothing = torch.zeros(len(leading), columns, rank, dtype=torch.float64)
        return Spans(nothing, torch.ones(len(leading), dtype=torch.float64), 0.0)
    floor = rest + ridge * whole / columns
    directions = [
        one.vectors * ((one.energy - one.rest).clamp(min=0) / at_least).sqrt()
        for one, at_least in zip(leading, floor, strict=True)
    ]
    return Spans(torch.stack(directions), floor / float(usage @ floor), float(usage @ along) / whole)


@dataclass(frozen=True)
class LayerCurvature:
    """The curvature of a layer's experts, from their activations."""

    usage: torch.Tensor  # p, float64 [experts]: shares of the gate values, summing to 1
    inputs: Spans  # of gate and up
    neurons: Spans  # of down

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that a patched model gives them."""
        return {
            "usage": self.usage,
            "input_floor": self.inputs.floor,
            "input_directions": self.inputs.directions,
            "neuron_floor": self.neurons.floor,
            "neuron_directions": self.neurons.directions,
        }


def layer_curvature(
    experts: Experts, inputs: torch.Tensor, routing: TokenRouting, activation: Activation, rank: int, ridge: float
) -> LayerCurvature:
    """The curvature of a layer's experts from the tokens that each receives.

    Args:
        experts: with their neurons in the final order.
        inputs: float32 ``[tokens, hidden]``.

    Memory: one expert, its tokens and their neurons in float32; one second moment in float64 twice.
    """
    mass = routing.mass(experts.count).cpu()
    leading: tuple[list[Leading], list[Leading]] = ([], [])
    for number, gate_mass in enumerate(mass.tolist()):
        token, gate = routing.of(number)
        rows, expert = inputs[token], experts.expert(number).to(inputs)
        leading[0].append(Leading.of(second_moment(rows, gate), gate_mass, rank))
        leading[1].append(Leading.of(second_moment(neurons(rows, expert, activation), gate), gate_mass, rank))
    usage = mass / mass.sum() if mass.sum() > 0 else torch.full_like(mass, 1 / len(mass))
    return LayerCurvature(usage, *(spans(one, usage, ridge) for one in leading))
