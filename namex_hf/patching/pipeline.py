"""The one loop: every MoE layer goes through the steps of the recipe, and what comes out is a `LayerResult`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..calibration.text import CalibrationText
from ..families import Config
from ..merging.moe_layer import Text
from ..merging.propagation import PropagationState
from ..merging.weightings import ExpertStatistics
from ..progress import ProgressCallback, ProgressEvent, no_progress, of_layer
from ..recipe import Grouped, Recipe
from .moments import MomentsFolder
from .result import LayerResult, PipelineState
from .sources import LayerSource
from .steps import steps_of
from .steps.step import LayerWork, Step
from .text_pass import TextPass


@dataclass
class Passage:
    """What goes from layer to layer."""

    base: PropagationState | None = None
    text: TextPass | None = None  # None: no text is read

    def state(self, layer: int) -> PipelineState:
        """On arrival at a decoder layer."""
        hidden, original = (self.text.hidden, self.text.original) if self.text else (None, None)
        return PipelineState(layer, self.base, hidden, original)


@dataclass(frozen=True)
class Pipeline:
    """What every layer goes through.

    Memory: one layer's experts, what its steps say, and with text what `TextPass` says.
    """

    source: LayerSource
    recipe: Recipe
    config: Config  # ``config.json`` of the result
    text: CalibrationText | None = None  # None: the recipe reads none
    scores: Mapping[int, ExpertStatistics] | None = None  # by layer: of another run, in the place of the text
    moments: MomentsFolder | None = None  # likewise, or to be saved there
    gradients: Mapping[int, torch.Tensor] | None = None  # by layer, scores of neurons ``[N, width]``
    counts: Sequence[int] | None = None  # of experts that each MoE layer keeps; None: all keep the recipe's number
    progress: ProgressCallback = no_progress
    shared: Passage | None = None  # with other results from the same reading, which are at the same layer or above

    @cached_property
    def steps(self) -> list[Step]:
        return steps_of(self.recipe)

    def run(self, state: PipelineState | None = None) -> Iterator[LayerResult]:
        """The layers, one after the other, from the bottom or from where a killed run left them.

        Raises:
            CheckpointError, NotFiniteError: an expert holds NaN or infinity.
            RecipeError: the result would.
        """
        state = state or PipelineState()
        passage = self.shared or Passage()
        passage.base = state.base
        known = self.scores is not None or (self.moments is not None and self.moments.is_complete)
        if self.text is not None and not known and passage.text is None:
            passage.text = TextPass(self.source, self.recipe, self.text, state)
        first = state.layer
        del state  # the text's hidden states have one owner
        for layer in self.source.shape.layers:
            if layer >= first:
                yield self.layer(layer, passage)  # no reference stays here: the next layer needs the memory

    def layer(self, layer: int, passage: Passage) -> LayerResult:
        """One layer; what the next one depends on takes the place of what this one depended on."""
        start, text = time.perf_counter(), passage.text
        merge, progress = self.recipe.merge, of_layer(self.progress, layer)
        if self.counts is not None:
            assert isinstance(merge, Grouped)
            merge = replace(merge, experts=self.counts[self.source.shape.layers.index(layer)])
        work = LayerWork(self.source, self.recipe, merge, self.config, layer, progress, passage.base)
        work.moments = self.moments
        work.gradients = None if self.gradients is None else self.gradients[layer]
        if text is not None:
            text.tap(layer)
            progress(ProgressEvent("read"))
            work.text, work.ids = text.activations(work.mixture), text.text.ids
        elif self.recipe.needs_text:  # it is known what the text says
            work.text = Text.nothing(work.mixture, self.recipe.device)
            work.scores = None if self.scores is None else self.scores[layer]
        for step in self.steps:
            step(work)
        if text is not None:
            text.pass_on(work.passed_on(self.recipe.calibration.when))
        passage.base = work.base
        seconds = round(time.perf_counter() - start, 4)
        return work.result(passage.state(layer + 1), seconds)
