"""What the pipeline has made of a layer, and how it is saved until the result is written."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from ..checkpoint.header import TensorSpan, read_header
from ..checkpoint.shard import Item
from ..families.outline import Outline
from ..merging.experts import Expert, ExpertWeights
from ..merging.propagation import PropagationState

ADDED, STATISTIC = "added.", "statistic."
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PipelineState:
    """What the next layer depends on: the base expert and the text's hidden states on arrival there."""

    layer: int = 0  # of the decoder
    base: PropagationState | None = None
    hidden: torch.Tensor | None = None  # float32 [sequences, length, hidden]; None: no text is read, or none was yet
    original: torch.Tensor | None = None  # as hidden, of the model that is patched, where layers aim at that

    def tensors(self) -> Tensors:
        """All of it, by name."""
        streams = {"hidden": self.hidden, "original": self.original}
        named = {name: tensor for name, tensor in streams.items() if tensor is not None}
        if self.base is None:
            return named
        assert self.base.weights is not None
        return {**named, **self.base.base, **self.base.momentum, "weights": self.base.weights}

    @classmethod
    def of(cls, layer: int, tensors: Tensors) -> "PipelineState":
        """From what `tensors` gave."""
        hidden, original = tensors.pop("hidden", None), tensors.pop("original", None)
        if not tensors:
            return cls(layer, None, hidden, original)
        matrices, weights = ExpertWeights.of(tensors.pop), tensors.pop("weights")
        return cls(layer, PropagationState(matrices, weights, tensors), hidden, original)


class MadeExperts(Protocol):
    """The experts of a result, in memory or made one at a time."""

    def expert(self, number: int, /) -> Expert: ...


@dataclass(frozen=True)
class LayerResult:
    """A MoE layer that is finished."""

    layer: int
    record: dict[str, Any]  # for the report, as plain values
    state: PipelineState
    statistics: Tensors = field(default_factory=dict)  # cosines, usage
    added: Tensors = field(default_factory=dict)  # base.gate_proj, curvature.usage, cosine_router.scale ...
    router: torch.Tensor | None = None  # [K, hidden]; None: the source's
    bias: torch.Tensor | None = None  # correction bias of K experts; None: the source's, or none
    experts: MadeExperts | None = None  # K; None: the source's
    shared: Tensors = field(default_factory=dict)  # by `Outline.shared`; empty: the source's
    orders: torch.Tensor | None = None  # int64 [N, width], of the source's neurons; None: as they are

    def tensors(self) -> Tensors:
        """What is saved of it. Experts that are made one at a time are written when they are made, and not saved."""
        saved = {f"{STATISTIC}{name}": tensor for name, tensor in self.statistics.items()}
        saved |= {f"{ADDED}{name}": tensor for name, tensor in self.added.items()}
        saved |= {f"shared.{part}": tensor for part, tensor in self.shared.items()}
        if self.orders is not None:
            saved["orders"] = self.orders
        if self.router is not None:
            saved["router"] = self.router
        if self.bias is not None:
            saved["bias"] = self.bias
        if isinstance(self.experts, ExpertWeights):
            for name, matrices in self.experts.items():
                saved |= {f"expert.{number}.{name}": matrix for number, matrix in enumerate(matrices)}
        return saved


@dataclass(frozen=True)
class SavedResult:
    """A `LayerResult` in its file."""

    layer: int
    file: Path

    def added(self, outline: Outline) -> list[Item]:
        """What the layer's block has more than before."""
        return self._items(ADDED, lambda name: outline.added(self.layer, *name.split(".", 1)))

    def replaced(self, outline: Outline, count: int) -> list[Item]:
        """Router, experts and shared expert, as far as they are in the place of the source's."""
        shared, spans = outline.shared(self.layer), read_header(self.file)
        items = [Item.of(outline.file(outline.router(self.layer)), spans["router"])]
        if bias := outline.bias(self.layer):
            items.append(Item.of(outline.file(bias), spans["bias"]))
        for name, (expert, projection) in outline.experts(self.layer, count).items():
            items.append(Item.of(name, spans[f"expert.{expert}.{projection}"]))
        return items + self._items("shared.", lambda part: outline.file(shared[part]))

    def order(self, expert: int) -> torch.Tensor:
        """Of an expert's neurons."""
        with safe_open(self.file, framework="pt") as file:
            order: torch.Tensor = file.get_slice("orders")[expert]
        return order

    def statistics(self) -> Tensors:
        """By ``layers.L.`` and their names."""
        with safe_open(self.file, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(STATISTIC)]  # noqa: SIM118  (no mapping)
            return {f"layers.{self.layer}.{name.removeprefix(STATISTIC)}": file.get_tensor(name) for name in names}

    def _items(self, kind: str, name_of: Callable[[str], str]) -> list[Item]:
        spans: dict[str, TensorSpan] = read_header(self.file)
        return [Item.of(name_of(n.removeprefix(kind)), span) for n, span in spans.items() if n.startswith(kind)]
