"""Second moments of an expert's neurons: they say which neurons can go, and what the others' downs make up for."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .experts import Expert
from .moe_layer import Text
from .routing import Activation, neurons, on_tokens

CARRIED = 0.1
"""A neuron carries an output if so much of it, or more, is its own."""


class Moments(Protocol):
    """Of the experts of a layer. They do not depend on the width that experts are cut to."""

    def tokens(self, number: int, /) -> int:
        """How many tokens an expert received."""

    def of(self, number: int, expert: Expert, /) -> tuple[Tensor, Tensor]:
        """``H = sum_t z_t z_t^T`` over an expert's tokens, float32 ``[all, all]``, and numbers of neurons that stay.

        z is the gate value and the weight of errors times what the down matrix receives. Neurons stay that carry a
        super expert's largest output; of other experts there are none.
        """


class KnownMoments(Moments, Protocol):
    """Measured before."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What the layer's record said of the text."""


@dataclass(frozen=True)
class TextMoments:
    """Measured on calibration text. Memory: one expert's neurons on its own tokens twice."""

    activation: Activation
    text: Text  # with the routing of the layer whose experts these are
    weight: Tensor  # [tokens], of errors
    protected: Collection[int] = ()  # super experts
    save: Callable[[int, Tensor, Tensor], None] | None = None  # gets an expert's number and what `of` returns

    def tokens(self, number: int) -> int:
        return len(self.text.routing.of(number)[0])

    def of(self, number: int, expert: Expert) -> tuple[Tensor, Tensor]:
        activations, peak = self.activations(number, expert)
        moment = activations.T @ activations
        if self.save is not None:
            self.save(number, moment, peak)
        return moment, peak

    def activations(self, number: int, expert: Expert) -> tuple[Tensor, Tensor]:
        """z of an expert's tokens, float32 ``[tokens, all]``, and neurons that stay, as `Moments.of`."""
        token, gate = self.text.routing.of(number)
        inputs = self.text.inputs
        peak = torch.empty(0, dtype=torch.int64, device=inputs.device)
        if not len(token):
            return inputs.new_empty(0, expert.down.shape[1]), peak
        activations = on_tokens(neurons, inputs[token], expert, self.activation)
        if number in self.protected:
            peak = of_peak(activations, expert.down.to(activations))
        activations *= (gate * self.weight[token])[:, None]
        return activations, peak


def of_peak(activations: Tensor, down: Tensor) -> Tensor:
    """Numbers of the neurons that carry the largest entry of an expert's outputs.

    Args:
        activations: ``[tokens, width]``, what the down matrix receives.
        down: ``[hidden, width]``.
    """
    outputs = activations @ down.T
    row, channel = divmod(int(outputs.abs().argmax()), outputs.shape[1])
    parts = activations[row] * down[channel]
    carried = parts * outputs[row, channel].sign() >= CARRIED * outputs[row, channel].abs()
    return carried.nonzero().flatten()
