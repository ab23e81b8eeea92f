"""Decoder layers and MoE blocks that propagate the base expert in the forward pass: subclasses of the patched classes.

They have the same parameters under the same names. A layer returns the base with its hidden states, and the next layer
receives both; no module stores it.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import TrainingError
from ..models.arguments import cache_in
from ..models.patched_model import SegmentedLayer
from ..models.soft import base_matrices
from ..recipe import AroundBase
from .gathered import attached_experts_of, curvature_of
from .live_step import step_on


class BaseState(NamedTuple):
    """State of the propagation between two MoE layers."""

    base: dict[str, torch.Tensor]
    """E_m by projection, in float32 (float64 in a float64 model)."""
    momentum: dict[str, torch.Tensor]
    """Buffers of `merging.momentum.momentum_step`: none, one or two for each projection, in the same dtype."""


class LayerOutput(NamedTuple):
    """Output of a decoder layer between MoE layers. It is a tuple, so that wrappers find every tensor in it."""

    hidden_states: torch.Tensor
    state: BaseState


class LiveBlock(nn.Module):
    """Mixin for a MoE block that uses the propagated base and computes the next one."""

    experts: Any
    base_expert: Any
    merge: AroundBase
    """The merge with the parameters of the propagation."""
    last: bool
    """Whether this is the last MoE layer, which computes no next base."""
    weights: torch.Tensor
    """Weights of the games, float64 ``[games, N]``, on the CPU: constants until the next bargain."""

    def forward(self, hidden_states: torch.Tensor, *routing: Any, state: BaseState | None = None) -> Any:
        """``[batch, tokens, hidden]`` to the same, and the next state; None after the last MoE layer.

        Args:
            routing: more arguments of the patched block.
            state: None for the first MoE layer, which uses its stored base expert.
        """
        current = self.first_state(hidden_states) if state is None else state
        dtype = next(self.base_expert.parameters()).dtype
        base = {name: matrix.to(dtype) for name, matrix in current.base.items()}
        return super().forward(hidden_states, *routing, base=base), self.next_state(current)

    def first_state(self, like: torch.Tensor) -> BaseState:
        """The propagation's beginning: the stored base expert. Args: like, a tensor of the pass, for an adapter."""
        return BaseState({name: widened(matrix) for name, matrix in base_matrices(self.base_expert, like).items()}, {})

    def next_state(self, state: BaseState) -> BaseState | None:
        """A step of the propagation (paper eq. 3, 9 and 11)."""
        if self.last:
            return None
        base = {name: widened(matrix) for name, matrix in state.base.items()}  # FSDP2's mixed precision narrows inputs
        momentum = {name: widened(buffer) for name, buffer in state.momentum.items()}
        curvature = curvature_of(self) if self.merge.curved_step else None
        return BaseState(*step_on(attached_experts_of(self), base, momentum, self.weights, self.merge, curvature))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class LiveLayer(nn.Module):
    """Mixin for a decoder layer of a patched model."""

    mlp: nn.Module
    attended: Any
    routing: Any
    post_attention_layernorm: nn.Module
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Any

    def forward(
        self,
        hidden_states: torch.Tensor | LayerOutput,
        *,
        segments: Any = None,
        token_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | LayerOutput:
        """As the patched layer's, with the state of the propagation after the first MoE layer and up to the last.

        Raises:
            TrainingError: gradient checkpointing is reentrant, which loses gradients of all but plain tensors.
        """
        self._refuse_reentrant()
        plain, state = hidden_states if isinstance(hidden_states, LayerOutput) else (hidden_states, None)
        attended = self.attended(plain, **kwargs)
        normed = self.post_attention_layernorm(attended)
        if isinstance(self.mlp, LiveBlock):
            routing = self.routing(segments, token_ids, cache_in(kwargs))
            output, state = self.mlp(normed, *routing, state=state)
        else:
            output = self.mlp(normed)
        return attended + output if state is None else LayerOutput(attended + output, state)

    def _refuse_reentrant(self) -> None:
        if self.gradient_checkpointing and self.training:
            options = getattr(self._gradient_checkpointing_func, "keywords", {})  # of transformers' partial
            if options.get("use_reentrant"):
                raise TrainingError("use_reentrant is true, under which a live base gets no gradient; accepted: false")


@cache
def live_form(kind: type) -> type:
    """The live form of a patched block or layer; its `stored` is `kind`."""
    mixin = LiveLayer if issubclass(kind, SegmentedLayer) else LiveBlock
    return type(f"Live{kind.__name__.removeprefix('Namex')}", (mixin, kind), {"stored": kind})
