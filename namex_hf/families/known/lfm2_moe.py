"""LFM2-MoE."""

from typing import Any

from ...merging.gate import Gate
from ..family import Family


def gate(config: Any) -> Gate:
    return Gate(config.num_experts_per_tok, bool(config.norm_topk_prob), "sigmoid", config.routed_scaling_factor)


FAMILY = Family(model_type="lfm2_moe", gate=gate, bias="expert_bias", norm="ffn_norm.weight")
