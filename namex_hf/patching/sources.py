"""A model as layers to read, wherever it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..calibration.decoder import Read
from ..families import Config, MoeShape
from ..families.outline import Outline
from ..merging.experts import Expert, ExpertWeights
from ..merging.moe_layer import MoELayer


@dataclass(frozen=True)
class LayerSource:
    """The MoE layers of a model, to be read one at a time. Tensors are on the CPU, in their own dtype."""

    config: Config
    outline: Outline
    read: Read
    dtype: Callable[[int], torch.dtype]  # of a MoE layer's experts
    experts: Callable[[int], Expert]  # of a MoE layer, stacked
    named: Callable[[int], AbstractContextManager[None]]  # gives a complaint about an expert its tensor's name

    @property
    def shape(self) -> MoeShape:
        return self.outline.shape

    def moe_layer(self, layer: int) -> MoELayer:
        name = self.outline.bias(layer)
        bias = None if name is None else self.read(name)
        return MoELayer(self.experts(layer), self.router(layer), self.shape.gate, self.outline.activation, bias)

    def router(self, layer: int) -> torch.Tensor:
        return self.read(self.outline.router(layer))

    def norm(self, layer: int) -> torch.Tensor:
        """``[hidden]``, what the norm before the router multiplies by; ones where there is no norm."""
        name, offset = self.outline.router_norm(layer), self.outline.family.norm_offset
        if name is None:
            return torch.ones(self.shape.hidden)
        return self.read(name) + offset if offset else self.read(name)

    def shared(self, layer: int) -> dict[str, torch.Tensor]:
        """The shared expert of a MoE layer by projection, and its ``gate`` where it has one."""
        return {part: self.read(name) for part, name in self.outline.shared(layer).items()}


def model_source(model: Any, outline: Outline, copies: bool) -> LayerSource:
    """A live model. A layer is read before it is replaced, and no layer above reads one below.

    Args:
        copies: whether a layer's experts are copied, so that they can be changed; else they are views.
    """
    state = model.state_dict(keep_vars=True)

    def read(name: str) -> torch.Tensor:
        return state[name].detach().cpu()

    def fused(layer: int) -> Any:
        return model.get_submodule(outline.blocks[layer]).experts

    def experts(layer: int) -> Expert:
        gate_up, down = fused(layer).gate_up_proj.detach().cpu(), fused(layer).down_proj.detach().cpu()
        width = outline.shape.width
        views = ExpertWeights(gate_up[:, :width], gate_up[:, width:], down)
        return views.map(torch.clone) if copies else views

    def dtype(layer: int) -> torch.dtype:
        kind: torch.dtype = fused(layer).down_proj.dtype
        return kind

    return LayerSource(model.config.to_dict(), outline, read, dtype, experts, lambda layer: nullcontext())
