"""Blocks with top-k experts, shared by the families: ``merge: residual``, and all blocks without a base expert.

``residual`` is ``F(x) = sum_topk s_i f_i(x) + (1 - sum_topk s_i) f_base(x)``. It mixes outputs, and NAMEx eq. 9 mixes
weights. The two agree to first order in ``E_i - E_m``, so only near the base; pretrained experts are far from it. The
second term is absent under ``method: smoe`` and ``merge: grouped``, which need this class for their routing alone, and
in the first MoE layer under ``first_layer: sparse``.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP, Qwen2MoeTopKRouter

from .configuration_namex import is_residual, stays_sparse
from .routers import ChosenRouting


def left_over_mass(scores: Tensor) -> Tensor:
    """``1 - sum_topk s_i`` of every token.

    The float32 sum is over the scores in the dtype that the experts receive, so that all weights together are 1 in any
    dtype. If top-k is all experts, rounding can give a value below 0, which is clamped to 0.

    Args:
        scores: ``[tokens, top_k]``, the router's softmax values, not renormalised.

    Returns:
        ``[tokens, 1]``, in the dtype of `scores`.
    """
    return (1.0 - scores.float().sum(-1, keepdim=True)).clamp(min=0.0).to(scores.dtype)


def swiglu_mlp(tokens: Tensor, base: Mapping[str, Tensor], activation: Any) -> Tensor:
    """`Qwen2MoeMLP` as a function of its matrices, ``[tokens, hidden] -> [tokens, hidden]``."""
    gate, up = F.linear(tokens, base["gate_proj"]), F.linear(tokens, base["up_proj"])
    return F.linear(activation(gate) * up, base["down_proj"])


class PaddedRouter(Qwen2MoeTopKRouter):
    """A linear router over fewer experts than the largest layer has.

    Its logits are padded to the width of that layer with minus infinity: the auxiliary losses of transformers and
    DeepSeek stack the layers.
    """

    width: int
    """Number of experts of the largest layer."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[tokens, hidden]`` to logits ``[tokens, width]``, values and experts ``[tokens, top_k]``."""
        logits, value, index = super().forward(hidden_states)
        return F.pad(logits, (0, self.width - self.num_experts), value=float("-inf")), value, index


def set_expert_count(block: Any, config: Any, layer: int) -> None:
    """Give a block the number of experts that ``config.layer_experts`` states for its layer.

    The first experts keep their values.
    """
    if config.layer_experts is None:
        return
    count, gate, experts = config.layer_experts[layer], block.gate, block.experts
    if len(gate.weight) != count:
        for module, name in ((experts, "gate_up_proj"), (experts, "down_proj"), (gate, "weight")):
            setattr(module, name, nn.Parameter(getattr(module, name).detach()[:count].clone()))
    experts.num_experts = gate.num_experts = count
    gate.top_k = min(gate.top_k, count)
    gate.__class__, gate.width = PaddedRouter, config.num_experts


class SparseRouting(ChosenRouting):
    """Mixin for a MoE block of `gate`, `experts` and perhaps `base_expert`, a SwiGLU MLP of the routed width."""

    experts: nn.Module
    base_expert: Any

    def add_parts(self, config, layer: int) -> None:
        """Add the parts that the stock block lacks. Args: layer, the index of the decoder layer."""
        self.base_expert = None
        if is_residual(config.namex) and not stays_sparse(config, layer):
            self.base_expert = Qwen2MoeMLP(config, intermediate_size=config.moe_intermediate_size)
        self.add_router(config)

    def routed(self, flat: Tensor, token_ids: Tensor | None = None, base: Mapping[str, Tensor] | None = None) -> Tensor:
        """``F(x)`` without the shared expert, ``[tokens, hidden] -> [tokens, hidden]``.

        Args:
            base: matrices by projection, in place of the stored base expert.
        """
        scores, chosen = self.route(flat, token_ids)
        output = self.experts(flat, chosen, scores)
        if self.base_expert is None:
            return output
        base_output = self.base_expert(flat) if base is None else swiglu_mlp(flat, base, self.base_expert.act_fn)
        return output + left_over_mass(scores) * base_output
