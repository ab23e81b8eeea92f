"""A model as layers to read, wherever it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.activations import ACT2FN

from ..calibration.decoder import Read
from ..families import Config, Family, MoeShape
from ..merging.experts import Expert, ExpertWeights
from ..merging.moe_layer import MoELayer


@dataclass(frozen=True)
class LayerSource:
    """The MoE layers of a model, to be read one at a time. Tensors are on the CPU, in their own dtype."""

    config: Config
    family: Family
    shape: MoeShape
    read: Read
    dtype: Callable[[int], torch.dtype]  # of a MoE layer's experts
    experts: Callable[[int], Expert]  # of a MoE layer, stacked
    named: Callable[[int], AbstractContextManager[None]]  # gives a complaint about an expert its tensor's name

    def moe_layer(self, layer: int) -> MoELayer:
        activation = ACT2FN[self.config.get("hidden_act", "silu")]
        return MoELayer(self.experts(layer), self.router(layer), self.shape.top_k, self.shape.renormalises, activation)

    def router(self, layer: int) -> torch.Tensor:
        return self.read(self.family.router(layer))

    def norm(self, layer: int) -> torch.Tensor:
        """The weight of the norm before the router."""
        return self.read(self.family.router_norm(layer))

    def shared(self, layer: int) -> dict[str, torch.Tensor]:
        """The shared expert of a MoE layer by projection, and its ``gate`` where it has one."""
        return {part: self.read(name) for part, name in self.family.shared_parts(layer).items()}


def model_source(model: Any, family: Family, shape: MoeShape, copies: bool) -> LayerSource:
    """A live model. A layer is read before it is replaced, and no layer above reads one below.

    Args:
        copies: whether a layer's experts are copied, so that they can be changed; else they are views.
    """
    parameters = dict(model.named_parameters())

    def read(name: str) -> torch.Tensor:
        return parameters[name].detach().cpu()

    def fused(layer: int) -> Any:
        return model.get_submodule(family.block(layer)).experts

    def experts(layer: int) -> Expert:
        gate_up, down = fused(layer).gate_up_proj.detach().cpu(), fused(layer).down_proj.detach().cpu()
        views = ExpertWeights(gate_up[:, : shape.width], gate_up[:, shape.width :], down)
        return views.map(torch.clone) if copies else views

    def dtype(layer: int) -> torch.dtype:
        kind: torch.dtype = fused(layer).down_proj.dtype
        return kind

    return LayerSource(model.config.to_dict(), family, shape, read, dtype, experts, lambda layer: nullcontext())
