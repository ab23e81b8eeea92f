"""A layer that keeps every expert and its router, with fewer neurons in each expert."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..progress import ProgressCallback, ProgressEvent, no_progress
from ..recipe import Narrow
from ..recipe.choices import ErrorWeights
from .error_weights import TINY, error_weights
from .experts import Expert, NotFiniteError
from .moe_layer import MoELayer, Text
from .neurons import neurons_that_stay, refitted, ridged_moment
from .routing import neurons
from .settings import DEFAULTS, FitSettings
from .whole_fit import WholeFit

MASSIVE = 10.0
"""How much larger than usual the largest output of a super expert is: the median of the layer's experts is usual."""
CARRIED = 0.1
"""A neuron carries an output if so much of it, or more, is its own."""
ROWS = ("gate_proj", "up_proj", "gate_proj.bias", "up_proj.bias")  # one row a neuron


@dataclass
class Narrowing:
    """A layer on the way to narrower experts.

    Memory: the narrower experts in their dtype; one expert in float32, its neurons on its own tokens twice, and four
    times ``[width, width]`` in float64; the source's output ``[tokens, hidden]`` and the result's. With a fit what
    `WholeFit` says.
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
        self.record["super_experts"] = self.super_experts
        self.weight = error_weights(self.error_weights, self.target, text.sources)
        # The source gets no local name here, so that its experts can be freed before a fit.
        layer = replace(self.source, experts=self.narrowed(), router=self.source.router.clone())
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

    def narrowed(self) -> Expert:
        """All experts with their gates and ups as they were, and downs that make up for what is gone."""
        each, stay = [], []
        for number in range(self.source.experts.count):
            expert = self.source.experts.expert(number)
            chosen, down = self.cut(number, expert)
            stay.append(chosen.cpu())
            each.append(with_neurons(expert, stay[-1], down))
            self.progress(ProgressEvent("narrowed", done=number + 1, total=self.source.experts.count))
        self.stay = torch.stack(stay)
        return each[0].of(lambda name: torch.stack([one[name] for one in each]), each[0])

    def cut(self, number: int, expert: Expert) -> tuple[Tensor, Tensor]:
        """The neurons of an expert that stay, and its down matrix for them.

        With fewer tokens than neurons that stay there is nothing to refit to: the neurons of the largest weights stay,
        and their downs as they are.
        """
        token, gate = self.text.routing.of(number)
        own = expert.to(self.text.inputs)
        for name, matrix in own.items():
            if not matrix.isfinite().all():
                raise NotFiniteError(number, name)
        if len(token) < self.merge.width:
            sizes = own.down.norm(dim=0) * own.up.norm(dim=1) * (1 if own.gate is None else own.gate.norm(dim=1))
            stay = sizes.topk(self.merge.width).indices.sort().values
            return stay, own.down[:, stay]
        gate = gate * self.weight[token]
        moment = ridged_moment(gate[:, None] * neurons(self.text.inputs[token], own, self.source.activation))
        always = self.of_peak(token, own) if number in self.super_experts else None
        stay = neurons_that_stay(moment, own.down, self.merge.width, self.merge.neurons, always)
        return stay, refitted(moment, own.down, stay)

    def record_peak(self, number: int, gate: Tensor, outputs: Tensor) -> None:
        """Note the largest entry of an expert's outputs on its tokens."""
        self.peaks[number] = max(float(self.peaks[number]), float(outputs.abs().max()))

    @property
    def super_experts(self) -> list[int]:
        """Experts with massive activations: outputs `MASSIVE` times as large as is usual in the layer (Su et al. 2025).

        A model depends on them out of all proportion to their tokens.
        """
        usual = self.peaks[self.peaks > 0].median() if (self.peaks > 0).any() else torch.tensor(0.0)
        return (self.peaks > MASSIVE * usual).nonzero().flatten().tolist() if usual > 0 else []

    def of_peak(self, token: Tensor, own: Expert) -> Tensor:
        """Numbers of the neurons that carry the largest entry of an expert's outputs, most first."""
        activations = neurons(self.text.inputs[token], own, self.source.activation)
        outputs = activations @ own.down.T
        row, channel = divmod(int(outputs.abs().argmax()), outputs.shape[1])
        parts = activations[row] * own.down[channel]
        carried = parts * outputs[row, channel].sign() >= CARRIED * outputs[row, channel].abs()
        return carried.nonzero().flatten()[: self.merge.width]

    def record_error(self, stage: str, output: Tensor) -> None:
        """Record the output's error relative to the target."""
        weight = self.weight[:, None]
        error, energy = ((weight * part).square().sum() for part in (output - self.target, self.target))
        self.record["errors"].append({"stage": stage, "error": float(error / energy.clamp(min=TINY))})
        self.progress(ProgressEvent(stage))


def with_neurons(expert: Expert, stay: Tensor, down: Tensor) -> Expert:
    """An expert with some of its neurons, bit for bit, and another down matrix, rounded to the old one's dtype."""
    kept = expert.of(lambda name: expert[name][stay] if name in ROWS else expert[name], expert)
    return replace(kept, down=down.to(expert.down))
