"""The fit of a whole layer: rows, experts and shared expert together, and what the shared expert's change adds."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..progress import ProgressCallback
from .layer_fit import Problem, fit_layer
from .moe_layer import MoELayer, Text
from .routing import shared_expert_output
from .settings import FitSettings


@dataclass
class WholeFit:
    """Experts and router of a layer, and a copy of its shared expert, fitted in place to a target.

    Memory: twice ``[tokens, hidden]`` of the shared expert, and what `fit_layer` says.
    """

    layer: MoELayer
    text: Text
    target: Tensor  # float32 [tokens, hidden], of the routed experts
    weight: Tensor  # [tokens], of errors
    parts: Callable[[], Mapping[str, Tensor]]  # of the shared expert, as `shared_expert_output`
    settings: FitSettings
    progress: ProgressCallback
    shared: dict[str, Tensor] = field(init=False)  # once fitted
    shared_output_delta: Tensor = field(init=False)  # float32 [tokens, hidden], change through the fit

    def run(self, steps: int, seed: int) -> dict[str, Any]:
        """The record of the fit."""
        layer, text = self.layer, self.text
        self.shared = {part: tensor.clone() for part, tensor in self.parts().items()}
        delta = -self.shared_output()
        held_out = text.held_out_tokens
        problem = Problem(
            text.inputs,
            self.target - delta,
            self.weight,
            held_out,
            layer.gate,
            layer.activation,
            self.settings,
            layer.bias,
        )
        fitted = fit_layer(problem, layer.experts, layer.router, self.shared, steps, seed, self.progress)
        del problem
        self.shared_output_delta = delta.add_(self.shared_output())
        return {"of": "layer", **asdict(fitted)}

    def shared_output(self) -> Tensor:
        """The output of the shared expert as it now is, float32 ``[tokens, hidden]``."""
        output, batch = torch.zeros_like(self.text.inputs), self.settings.batch
        shared = {part: tensor.to(output) for part, tensor in self.shared.items()}
        if shared:
            for inputs, rows in zip(self.text.inputs.split(batch), output.split(batch), strict=True):
                rows.copy_(shared_expert_output(inputs, shared, self.layer.activation))
        return output
