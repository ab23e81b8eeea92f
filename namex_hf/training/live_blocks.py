"""Decoder layers and blocks through which the base expert walks in the forward pass: forms of the patched ones.

They have the parameters of the patched classes, under the same names. The base goes from layer to layer as what a layer
returns and the next is called with; no module keeps it.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import TrainingError
from ..models.arguments import cache_in
from ..models.modeling_namex_deepseek import NamexDeepseekDecoderLayer, NamexDeepseekMoeBlock, SoftDeepseekMoeBlock
from ..models.modeling_namex_qwen2_moe import (
    NamexQwen2MoeDecoderLayer,
    NamexQwen2MoeSparseMoeBlock,
    SoftQwen2MoeSparseMoeBlock,
)
from ..models.soft import base_matrices
from ..recipe import AroundBase
from .gathered import attached_experts_of, curvature_of
from .live_step import step_on


class Passing(NamedTuple):
    """The base expert between two MoE layers."""

    base: dict[str, torch.Tensor]
    """E_m by projection, in float32 (float64 where the model is)."""
    momentum: dict[str, torch.Tensor]
    """As `merging.momentum.momentum_step` has it: none, one or two buffers a projection, alike."""


class Carried(NamedTuple):
    """What a decoder layer hands to the next while the base is on its way. Wrappers find every tensor in it."""

    hidden_states: torch.Tensor
    passing: Passing


class LiveBlock(nn.Module):
    """Mixin for a MoE block: it answers with the base that arrives, and takes it one step on."""

    experts: Any
    base_expert: Any
    merge: AroundBase
    """How the base moves."""
    last: bool
    """Whether no MoE layer follows, to which a base would go."""
    weights: torch.Tensor
    """Of the games, float64 ``[games, N]``, on the CPU: constants until they are solved for again."""

    def forward(self, hidden_states: torch.Tensor, *routing: Any, passing: Passing | None = None) -> Any:
        """``[batch, tokens, hidden]`` to the same, and what passes on; None: nothing does, this is the last MoE layer.

        Args:
            routing: what the patched block takes.
            passing: None: this is the first MoE layer, whose base is its own parameters'.
        """
        here = self.arrived(hidden_states) if passing is None else passing
        own = next(self.base_expert.parameters()).dtype
        base = {name: matrix.to(own) for name, matrix in here.base.items()}
        return super().forward(hidden_states, *routing, base=base), self.taken_on(here)

    def arrived(self, like: torch.Tensor) -> Passing:
        """The walk's begin, at the stored base expert. Args: like, a tensor of the pass, for an adapter."""
        return Passing({name: widened(matrix) for name, matrix in base_matrices(self.base_expert, like).items()}, {})

    def taken_on(self, here: Passing) -> Passing | None:
        """One step on (paper eq. 3, 9 and 11)."""
        if self.last:
            return None
        base = {name: widened(matrix) for name, matrix in here.base.items()}  # FSDP2's mixed precision narrows inputs
        momentum = {name: widened(buffer) for name, buffer in here.momentum.items()}
        curvature = curvature_of(self) if self.merge.curved_step else None
        return Passing(*step_on(attached_experts_of(self), base, momentum, self.weights, self.merge, curvature))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
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
        hidden_states: torch.Tensor | Carried,
        *,
        segments: Any = None,
        token_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | Carried:
        """As the patched layer's, and with the base expert where one is on its way.

        Raises:
            TrainingError: under reentrant gradient checkpointing, which loses gradients of all but plain tensors.
        """
        self._refuse_reentrant()
        given, passing = hidden_states if isinstance(hidden_states, Carried) else (hidden_states, None)
        attended = self.attended(given, **kwargs)
        normed = self.post_attention_layernorm(attended)
        if isinstance(self.mlp, LiveBlock):
            routing = self.routing(segments, token_ids, cache_in(kwargs))
            mixed, passing = self.mlp(normed, *routing, passing=passing)
        else:
            mixed = self.mlp(normed)
        return attended + mixed if passing is None else Carried(attended + mixed, passing)

    def _refuse_reentrant(self) -> None:
        if self.gradient_checkpointing and self.training:
            options = getattr(self._gradient_checkpointing_func, "keywords", {})  # of transformers' partial
            if options.get("use_reentrant"):
                raise TrainingError("use_reentrant is true, under which a live base gets no gradient; accepted: false")


class LiveQwen2MoeSparseMoeBlock(LiveBlock, NamexQwen2MoeSparseMoeBlock):
    """``merge: residual``."""


class LiveSoftQwen2MoeSparseMoeBlock(LiveBlock, SoftQwen2MoeSparseMoeBlock):
    """``merge: soft``."""


class LiveQwen2MoeDecoderLayer(LiveLayer, NamexQwen2MoeDecoderLayer):  # type: ignore[misc]
    pass


class LiveDeepseekMoeBlock(LiveBlock, NamexDeepseekMoeBlock):
    """``merge: residual``."""


class LiveSoftDeepseekMoeBlock(LiveBlock, SoftDeepseekMoeBlock):  # type: ignore[misc]
    """``merge: soft``."""


class LiveDeepseekDecoderLayer(LiveLayer, NamexDeepseekDecoderLayer):  # type: ignore[misc]
    pass


LIVE: dict[type, type] = {
    NamexQwen2MoeSparseMoeBlock: LiveQwen2MoeSparseMoeBlock,
    SoftQwen2MoeSparseMoeBlock: LiveSoftQwen2MoeSparseMoeBlock,
    NamexQwen2MoeDecoderLayer: LiveQwen2MoeDecoderLayer,
    NamexDeepseekMoeBlock: LiveDeepseekMoeBlock,
    SoftDeepseekMoeBlock: LiveSoftDeepseekMoeBlock,
    NamexDeepseekDecoderLayer: LiveDeepseekDecoderLayer,
}
"""From a patched class to its live form."""
