"""What a step is, and what it works on."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ...families import Config, MoeShape
from ...merging.moe_layer import MoELayer, Text
from ...merging.propagation import PropagationState
from ...merging.weightings import ExpertStatistics
from ...progress import ProgressCallback
from ...recipe import Grouped, Narrow, Recipe, Residual, Soft
from ...recipe.choices import Calibrate
from ...recipe.merges import Nothing
from ..finite import require_finite_result
from ..moments import MomentsFolder
from ..result import LayerResult, MadeExperts, PipelineState, Tensors
from ..sources import LayerSource

AnyMerge = Residual | Soft | Grouped | Narrow | Nothing


@dataclass
class LayerWork:
    """A MoE layer on its way through the steps. They read the first half and fill the second."""

    source: LayerSource
    recipe: Recipe
    merge: AnyMerge  # the recipe's, with the number of experts of this layer
    config: Config  # ``config.json`` of the result
    layer: int
    progress: ProgressCallback  # of this layer
    base: PropagationState | None  # on arrival; the step that takes it on replaces it
    text: Text | None = None  # what the layer receives; None: no text is read
    ids: torch.Tensor | None = None  # of the text, ``[sequences, length]``
    scores: ExpertStatistics | None = None  # of another run, in the place of the text
    moments: MomentsFolder | None = None  # likewise, or to be saved there
    gradients: torch.Tensor | None = None  # [N, width], scores of neurons

    record: dict[str, Any] = field(default_factory=dict)
    statistics: Tensors = field(default_factory=dict)
    added: Tensors = field(default_factory=dict)
    router: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    experts: MadeExperts | None = None
    shared: Tensors = field(default_factory=dict)
    orders: torch.Tensor | None = None
    output: torch.Tensor | None = None  # the result's routed output on the text, float32 [tokens, hidden]
    target: torch.Tensor | None = None  # the source's, or what stands for it
    shared_delta: torch.Tensor | None = None  # change of the shared expert's output, part of `output`

    @cached_property
    def mixture(self) -> MoELayer:
        """The source's layer, read when a step first asks."""
        return self.source.moe_layer(self.layer)

    @property
    def position(self) -> int:
        """Of the layer among the MoE layers."""
        return self.source.shape.layers.index(self.layer)

    @property
    def stays_sparse(self) -> bool:
        return self.merge.stays_sparse(self.layer, self.source.shape.layers)

    @property
    def required_text(self) -> Text:
        """The text, of a step that needs one."""
        assert self.text is not None, "this step belongs to recipes that read text"
        return self.text

    @property
    def new_router(self) -> torch.Tensor:
        """The linear router of the result."""
        return self.source.router(self.layer) if self.router is None else self.router

    def add(self, tensors: Tensors) -> None:
        """Give the result's block tensors that the source's has not.

        Raises:
            RecipeError: one holds NaN or infinity.
        """
        require_finite_result(self.layer, tensors, self.recipe)
        self.added |= tensors

    def passed_on(self, when: Calibrate) -> torch.Tensor:
        """The routed output that the next layer receives: the result's, or the source's."""
        output = self.output if when == "after" else self.target
        assert output is not None, "the last step answers the text"
        return output

    def result(self, state: PipelineState, seconds: float) -> LayerResult:
        """Args: state, on arrival at the next layer; seconds, that the layer took."""
        record = {"layer": self.layer, "games": [], **self.record, "seconds": seconds}
        parts = (self.statistics, self.added, self.router, self.bias, self.experts, self.shared, self.orders)
        return LayerResult(self.layer, record, state, *parts)


@dataclass(frozen=True)
class LayerForm:
    """What is known of a layer before anything is read."""

    layer: int
    shape: MoeShape
    config: Config  # of the result
    experts: int  # routed experts of the result's layer
    expert_dtype: torch.dtype
    router_dtype: torch.dtype
    sparse: bool


@dataclass(frozen=True)
class Sizes:
    """What memory depends on."""

    shape: MoeShape
    layer: int  # bytes of the largest layer's experts
    experts: int  # of the largest layer of the result
    tokens: int  # of the text


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class Step:
    """One thing that a recipe does to every layer."""

    recipe: Recipe

    def __call__(self, work: LayerWork) -> None:
        raise NotImplementedError

    def added(self, form: LayerForm) -> Shapes:
        """Shapes and dtypes of the tensors that it adds to the block, as `LayerWork.add` takes them."""
        return {}

    def memory(self, sizes: Sizes) -> int:
        """Bytes that it holds at once, beyond the source's layer and the text."""
        return 0
