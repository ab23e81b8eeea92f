"""A MoE layer, and its activations on calibration text."""

from dataclasses import dataclass, replace

import torch

from .experts import Expert, Experts, ExpertWeights
from .gate import Gate
from .routing import Activation, TokenRouting, Visit, gate_values, route, routed_output


@dataclass(frozen=True)
class MoELayer:
    """The routed experts of a layer, and their router."""

    experts: Experts  # N, in any floating dtype
    router: torch.Tensor  # [N, hidden]
    gate: Gate
    activation: Activation
    bias: torch.Tensor | None = None  # correction bias of the gate, N numbers

    def expert(self, number: int, like: torch.Tensor) -> Expert:
        """One expert's matrices in the dtype of ``like``, and where it is."""
        return self.experts.expert(number).to(like)

    def set_down(self, number: int, down: torch.Tensor) -> None:
        """Give an expert another down matrix, in place, rounded to the experts' dtype."""
        self.experts.down[number].copy_(down)

    def without_experts(self) -> "MoELayer":
        """A copy without the experts, so that the caller can free them."""
        return replace(self, experts=ExpertWeights(None, (), ()))

    def route(self, inputs: torch.Tensor) -> TokenRouting:
        return route(inputs, self.router.to(inputs), self.gate, self.bias)

    def gates(self, inputs: torch.Tensor) -> torch.Tensor:
        """Gate values ``[tokens, N]``, zero beyond the top-k."""
        return gate_values(inputs, self.router.to(inputs), self.gate, self.bias)

    def output(self, inputs: torch.Tensor, routing: TokenRouting, visit: Visit | None = None) -> torch.Tensor:
        """The routed output, float32 ``[tokens, hidden]``. Args: visit, as `routed_output`."""
        return routed_output(inputs, routing, self.experts, self.activation, visit)


@dataclass(frozen=True)
class Text:
    """What a layer receives on calibration text, and what its output is to be."""

    inputs: torch.Tensor  # float32 [tokens, hidden]
    routing: TokenRouting  # by the layer's own router
    sources: torch.Tensor  # int64 [sequences], the file or data set of each; of equal length, one after the other
    held_out: torch.Tensor  # bool [sequences]: not for the fits by steps, but for choosing among them
    target: torch.Tensor | None = None  # float32 [tokens, hidden]; None: the layer's own routed output

    @classmethod
    def nothing(cls, layer: MoELayer, device: str) -> "Text":
        """No token at all."""
        inputs = torch.empty(0, layer.router.shape[1], device=device)
        none = torch.empty(0, dtype=torch.bool, device=device)
        return cls(inputs, layer.route(inputs), none.long(), none)

    @property
    def held_out_tokens(self) -> torch.Tensor:
        """Bool ``[tokens]``."""
        return self.held_out.repeat_interleave(len(self.inputs) // len(self.sources))
