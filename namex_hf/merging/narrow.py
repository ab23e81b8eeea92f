"""A layer that keeps every expert and its router, with fewer neurons in each expert."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..progress import ProgressCallback, ProgressEvent, no_progress
from ..recipe import Narrow
from ..recipe.choices import ErrorWeights
from .cut import Cut
from .error_weights import TINY, error_weights
from .moe_layer import MoELayer, Text
from .settings import DEFAULTS, FitSettings
from .super_experts import super_experts
from .whole_fit import WholeFit


@dataclass
class Narrowing:
    """A layer on the way to narrower experts.

    Memory: that of `Cut`, the source's output ``[tokens, hidden]`` and the result's. With a fit what `WholeFit` says.
    """

    source: MoELayer
    text: Text
    merge: Narrow
    seed: int = 0
    error_weights: ErrorWeights = "none"
    settings: FitSettings = DEFAULTS
    shared: Callable[[], Mapping[str, Tensor]] = dict  # parts of the shared expert, as `shared_expert_output`
    progress: ProgressCallback = no_progress
    record: dict[str, Any] = field(default_factory=dict)
    stay: Tensor = field(init=False)  # int64 [N, width], neurons that stay, ascending
    target: Tensor = field(init=False)  # float32 [tokens, hidden], the source's routed output
    weight: Tensor = field(init=False)  # [tokens], of errors
    peaks: Tensor = field(init=False)  # float32 [N], the largest entry of each expert's outputs
    super_experts: list[int] = field(init=False)  # the largest peak first
    refitted: dict[str, Tensor] = field(default_factory=dict)  # the shared expert, where it was fitted along
    shared_output_delta: Tensor | None = None  # float32 [tokens, hidden], change through that fit

    def run(self) -> tuple[MoELayer, Tensor]:
        """The narrower layer, and its routed output on the text, with the change of the shared output.

        Raises:
            NotFiniteError: an expert holds NaN or infinity.
        """
        text, count = self.text, self.source.experts.count
        self.record |= {"usage": text.routing.count(count).tolist(), "mass": text.routing.mass(count).tolist()}
        self.record |= {"games": [], "errors": [], "fits": []}
        self.peaks = torch.zeros(count)
        self.target = self.source.output(text.inputs, text.routing, self.record_peak)
        self.super_experts = super_experts(self.peaks)
        self.record |= {"peaks": self.peaks.tolist(), "super_experts": self.super_experts}
        self.weight = error_weights(self.error_weights, self.target, text.sources)
        # The source gets no local name here, so that its experts can be freed before a fit.
        assert self.merge.width is not None
        choice = self.merge.width, self.merge.neurons, self.seed, self.super_experts, self.progress
        experts, self.stay = Cut(self.source, text, self.weight, *choice).run()
        layer = replace(self.source, experts=experts, router=self.source.router.clone())
        self.source = self.source.without_experts()
        output = layer.output(text.inputs, text.routing)
        self.record_error("narrowed", output)
        if self.merge.fit.kind == "layer":
            fit = WholeFit(layer, text, self.target, self.weight, self.shared, self.settings, self.progress)
            self.record["fits"].append(fit.run(self.merge.fit.steps, self.seed))
            self.refitted, self.shared_output_delta = fit.shared, fit.shared_output_delta
            output = layer.output(text.inputs, layer.route(text.inputs)).add_(fit.shared_output_delta)
            self.record_error("layer", output)
        return layer, output

    def record_peak(self, number: int, gate: Tensor, outputs: Tensor) -> None:
        """Note the largest entry of an expert's outputs on its tokens."""
        self.peaks[number] = max(float(self.peaks[number]), float(outputs.abs().max()))

    def record_error(self, stage: str, output: Tensor) -> None:
        """Record the output's error relative to the target."""
        weight = self.weight[:, None]
        error, energy = ((weight * part).square().sum() for part in (output - self.target, self.target))
        self.record["errors"].append({"stage": stage, "error": float(error / energy.clamp(min=TINY))})
        self.progress(ProgressEvent(stage))
