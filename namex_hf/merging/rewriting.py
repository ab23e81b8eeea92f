"""What the merges that make a layer smaller on its activations on calibration text have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

from torch import Tensor

from ..progress import ProgressCallback, ProgressEvent, no_progress
from ..recipe import Smaller
from ..recipe.choices import ErrorWeights
from .cut import Cut
from .error_weights import TINY, error_weights
from .moe_layer import MoELayer, Text
from .moments import Moments
from .settings import DEFAULTS, FitSettings
from .whole_fit import WholeFit

M = TypeVar("M", bound=Smaller)


@dataclass
class Rewriting(ABC, Generic[M]):
    """A layer on the way to a smaller one.

    Memory: the source's output ``[tokens, hidden]`` and the result's, and what `Cut` and then `WholeFit` say.
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

    def cut(self, moments: Moments) -> None:
        """Take neurons out of the result's experts. Args: moments, of these."""
        assert self.merge.width is not None
        choice = self.merge.width, self.merge.neurons, self.seed, self.progress
        experts, self.stay = Cut(self.result.experts, moments, *choice).run()
        self.result = replace(self.result, experts=experts)

    def fit_all(self) -> None:
        """Fit rows, experts and shared expert together to the target; the source's experts are dropped first."""
        self.source = self.source.without_experts()
        parts = self.weight, self.shared, self.settings, self.progress
        fit = WholeFit(self.result, self.text, self.target, *parts)
        self.record["fits"].append(fit.run(self.merge.fit.steps, self.seed))
        self.refitted, self.shared_output_delta = fit.shared, fit.shared_output_delta
