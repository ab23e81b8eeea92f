"""Blocks in which the top-k experts stay, shared by the families: ``merge: residual``, and any that has no base expert.

``residual`` is NAMEx eq. 9 to first order in the experts:
``F(x) = sum_topk s_i f_i(x) + (1 - sum_topk s_i) f_base(x)``. Under ``method: smoe`` and ``merge: grouped`` there is no
second term, and a class is needed for the routing alone.
"""

import torch
from torch import nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP

from .configuration_namex import check_merge, is_residual
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


class SparseRouting(ChosenRouting):
    """Mixin for a MoE block of `gate`, `experts` and, where one is, `base_expert`, a SwiGLU MLP of the routed width."""

    experts: nn.Module
    base_expert: nn.Module | None

    def add_parts(self, config) -> None:
        """Give the block what it needs beyond the stock one."""
        # A field changed after the configuration was built has not passed its check.
        check_merge(config.namex, config.norm_topk_prob)
        self.base_expert = None
        if is_residual(config.namex):
            self.base_expert = Qwen2MoeMLP(config, intermediate_size=config.moe_intermediate_size)
        self.add_router(config)

    def routed(self, flat: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """``F(x)`` without the shared expert, ``[tokens, hidden] -> [tokens, hidden]``."""
        scores, chosen = self.route(flat, token_ids)
        output = self.experts(flat, chosen, scores)
        return output if self.base_expert is None else output + left_over_mass(scores) * self.base_expert(flat)


__all__ = ["SparseRouting", "left_over_mass"]
