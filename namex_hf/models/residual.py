"""The routed part of ``merge: residual``, shared by the families: top-k experts, and a base expert for the rest.

NAMEx eq. 9 to first order in the experts: ``F(x) = sum_topk s_i f_i(x) + (1 - sum_topk s_i) f_base(x)``.
"""

import torch
from torch import nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP

from .configuration_namex import check_merge


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


class ResidualRouting:
    """Mixin for a MoE block of `gate`, `experts` and `base_expert`, a SwiGLU MLP of the routed width."""

    gate: nn.Module
    experts: nn.Module
    base_expert: nn.Module

    def add_base_expert(self, config) -> None:
        # A field changed after the configuration was built has not passed its check.
        check_merge(config.namex, config.norm_topk_prob)
        self.base_expert = Qwen2MoeMLP(config, intermediate_size=config.moe_intermediate_size)

    def routed(self, flat: torch.Tensor) -> torch.Tensor:
        """``F(x)`` without the shared expert, ``[tokens, hidden] -> [tokens, hidden]``."""
        _, scores, chosen = self.gate(flat)
        return self.experts(flat, chosen, scores) + left_over_mass(scores) * self.base_expert(flat)


__all__ = ["ResidualRouting", "left_over_mass"]
