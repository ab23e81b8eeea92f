"""Qwen3.5-MoE, the model of text alone."""

from ..family import Family
from ..gate import renormalised

FAMILY = Family(
    model_type="qwen3_5_moe_text",
    gate=renormalised,
    shared_name="shared_expert",
    shared_gate_name="shared_expert_gate",
    norm_offset=1.0,
)
