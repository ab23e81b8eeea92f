"""What the merges that make a layer smaller on its activations on calibration text have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..progress import ProgressCallback, ProgressEvent, no_progress
from ..recipe import Smaller
from ..recipe.choices import ErrorWeights
from .cut import Cut
from .error_weights import TINY, error_weights
from .layer_fit import Problem, fit_layer
from .moe_layer import MoELayer, Text
from .moments import Moments
from .routing import shared_expert_output
from .settings import DEFAULTS, FitSettings

M = TypeVar("M", bound=Smaller)


@dataclass
class Rewriting(ABC, Generic[M]):
    """A layer on the way to a smaller one.

    Memory: the source's output ``[tokens, hidden]`` and the result's, and what `Cut` and then `fit_all` say.
    """

    source: MoELayer
    text: Text
    merge: M
    seed: int = 0
    error_weights: ErrorWeights = "none"
    settings: FitSettings = DEFAULTS
    shared: Callable[[], Mapping[str, Tensor]] = dict  # parts of the shared expert, as `shared_expert_output`
    progress: ProgressCallback = no_progress
    record: dict[str, Any] = field(default_factory=dict)
    result: MoELayer = field(init=False)
    saliency: Tensor | None = field(init=False, default=None)  # float64 [N], once `measure` has run
    peaks: Tensor | None = field(init=False, default=None)  # float64 [N], likewise: the largest entry of its outputs
    stay: Tensor | None = None  # int64 [experts of the result, width], neurons that stay, ascending; None: all
    refitted: dict[str, Tensor] = field(default_factory=dict)  # the shared expert, where it was fitted along
    shared_output_delta: Tensor | None = None  # float32 [tokens, hidden], change through that fit

    @abstractmethod
    def run(self) -> tuple[MoELayer, Tensor]:
        """The smaller layer, and its routed output on the text, with the change of the shared output.

        Raises:
            NotFiniteError: an expert holds NaN or infinity.
        """

    @cached_property
    @abstractmethod
    def target(self) -> Tensor:
        """What the routed output is compared with and fitted to, float32 ``[tokens, hidden]``."""

    @cached_property
    def weight(self) -> Tensor:
        """Of errors, ``[tokens]``."""
        return error_weights(self.error_weights, self.target, self.text.sources)

    def measure(self) -> Tensor:
        """The source's routed output. On the way every expert's saliency, the mean over its tokens of gate value times
        norm of the output, and the largest entry of its outputs."""
        self.saliency = saliency = torch.zeros(self.source.experts.count, dtype=torch.float64)
        self.peaks = peaks = torch.zeros_like(saliency)

        def visit(number: int, gate: Tensor, outputs: Tensor) -> None:
            saliency[number] = float((gate * outputs.norm(dim=1)).double().mean())
            peaks[number] = float(outputs.abs().max())

        return self.source.output(self.text.inputs, self.text.routing, visit)

    def output(self) -> Tensor:
        output = self.result.output(self.text.inputs, self.result.route(self.text.inputs))
        return output if self.shared_output_delta is None else output.add_(self.shared_output_delta)

    def record_error(self, stage: str, output: Tensor) -> Tensor:
        """Record the output's error relative to the target; returns the output."""
        weight = self.weight[:, None]
        error, energy = ((weight * part).square().sum() for part in (output - self.target, self.target))
        self.record["errors"].append({"stage": stage, "error": float(error / energy.clamp(min=TINY))})
        self.progress(ProgressEvent(stage))
        return output

    def cut(self, moments: Moments, scores: Tensor | None = None) -> Cut:
        """Take neurons out of the result's experts; returns how. Args: moments, of these; scores, as `Cut`."""
        assert self.merge.width is not None
        choice = self.merge.width, self.merge.neurons, self.seed, self.progress, scores
        cut = Cut(self.result.experts, moments, *choice)
        experts, self.stay = cut.run()
        self.result = replace(self.result, experts=experts)
        return cut

    def fit_all(self) -> None:
        """Fit rows, experts and a copy of the shared expert together to the target; the source's experts are dropped
        first.

        Memory: twice ``[tokens, hidden]`` of the shared expert, and what `fit_layer` says.
        """
        self.source = self.source.without_experts()
        layer, text = self.result, self.text
        self.refitted = {part: tensor.clone() for part, tensor in self.shared().items()}
        delta = -self.shared_output()
        of_layer = layer.gate, layer.activation, self.settings, layer.bias
        problem = Problem(text.inputs, self.target - delta, self.weight, text.held_out_tokens, *of_layer)
        start, steps = (layer.experts, layer.router, self.refitted), self.merge.fit.steps
        fitted = fit_layer(problem, *start, steps, self.seed, self.progress)
        del problem
        self.record["fits"].append({"of": "layer", **asdict(fitted)})
        self.shared_output_delta = delta.add_(self.shared_output())

    def shared_output(self) -> Tensor:
        """The output of the shared expert as it now is, float32 ``[tokens, hidden]``."""
        output, batch = torch.zeros_like(self.text.inputs), self.settings.batch
        shared = {part: tensor.to(output) for part, tensor in self.refitted.items()}
        if shared:
            for inputs, rows in zip(self.text.inputs.split(batch), output.split(batch), strict=True):
                rows.copy_(shared_expert_output(inputs, shared, self.result.activation))
        return output
