"""Blocks in which the top-k experts stay, shared by the families: ``merge: residual``, and any that has no base expert.

``residual`` is ``F(x) = sum_topk s_i f_i(x) + (1 - sum_topk s_i) f_base(x)``. It mixes outputs, where NAMEx eq. 9 mixes
weights; the two agree to first order in ``E_i - E_m``, so only near the base, where pretrained experts are not. Under
``method: smoe`` and ``merge: grouped`` there is no second term, and a class is needed for the routing alone. Nor is
there one in the first MoE layer under ``first_layer: sparse``, whatever the merge.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP, Qwen2MoeTopKRouter

from .configuration_namex import check_merge, is_residual, stays_sparse
from .routers import ChosenRouting


def left_over_mass(scores: torch.Tensor) -> torch.Tensor:
    """``1 - sum_topk s_i`` of every token.

    The sum is taken in float32 over the scores as the experts receive them, so that all weights together make 1 in
    any dtype. Where top-k takes every expert, rounding could leave a trace below 0: no mass is left then.

    Args:
        scores: ``[tokens, top_k]``, the router's softmax values, not renormalised.

    Returns:
        ``[tokens, 1]``, in the dtype of `scores`.
    """
    return (1.0 - scores.float().sum(-1, keepdim=True)).clamp(min=0.0).to(scores.dtype)


def apart(tokens: torch.Tensor, base: Mapping[str, torch.Tensor], activation: Any) -> torch.Tensor:
    """What `Qwen2MoeMLP` computes, ``[tokens, hidden] -> [tokens, hidden]``, with matrices that are no parameters."""
    gate, up = F.linear(tokens, base["gate_proj"]), F.linear(tokens, base["up_proj"])
    return F.linear(activation(gate) * up, base["down_proj"])


class FewerRouter(Qwen2MoeTopKRouter):
    """A linear router over fewer experts than another layer has.

    Its logits are handed out as wide as that layer's, minus infinity where there is no expert: the auxiliary losses
    of transformers and DeepSeek take the layers together.
    """

    most: int
    """Experts of the layer that has most."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[tokens, hidden]`` to logits ``[tokens, most]``, values and experts ``[tokens, top_k]``."""
        logits, value, index = super().forward(hidden_states)
        return F.pad(logits, (0, self.most - self.num_experts), value=float("-inf")), value, index


def give_layer_its_number(block: Any, config: Any, layer: int) -> None:
    """Make a block of ``config.num_experts`` experts one of as many as ``config.layer_experts`` says, not yet filled.

    One that has its number of experts already keeps them.
    """
    if config.layer_experts is None:
        return
    count, gate, experts = config.layer_experts[layer], block.gate, block.experts
    if len(gate.weight) != count:
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.new_empty(count, *experts.gate_up_proj.shape[1:]))
        experts.down_proj = nn.Parameter(experts.down_proj.new_empty(count, *experts.down_proj.shape[1:]))
        gate.weight = nn.Parameter(gate.weight.new_empty(count, gate.weight.shape[1]))
    experts.num_experts = gate.num_experts = count
    gate.top_k = min(gate.top_k, count)
    gate.__class__, gate.most = FewerRouter, config.num_experts


class SparseRouting(ChosenRouting):
    """Mixin for a MoE block of `gate`, `experts` and, where one is, `base_expert`, a SwiGLU MLP of the routed width."""

    gate: Any
    experts: nn.Module
    base_expert: Any

    def add_parts(self, config, layer: int) -> None:
        """Give the block what it needs beyond the stock one. Args: layer, the decoder layer that it is in."""
        # A field changed after the configuration was built has not passed its check.
        check_merge(config.namex, self.gate.norm_topk_prob)
        self.base_expert = None
        if is_residual(config.namex) and not stays_sparse(config, layer):
            self.base_expert = Qwen2MoeMLP(config, intermediate_size=config.moe_intermediate_size)
        self.add_router(config)

    def routed(
        self,
        flat: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        base: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``F(x)`` without the shared expert, ``[tokens, hidden] -> [tokens, hidden]``.

        Args:
            base: matrices by projection, in the place of the stored base expert.
        """
        scores, chosen = self.route(flat, token_ids)
        output = self.experts(flat, chosen, scores)
        if self.base_expert is None:
            return output
        answer = self.base_expert(flat) if base is None else apart(flat, base, self.base_expert.act_fn)
        return output + left_over_mass(scores) * answer


__all__ = ["FewerRouter", "SparseRouting", "give_layer_its_number", "left_over_mass"]
