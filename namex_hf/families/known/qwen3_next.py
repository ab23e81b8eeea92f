"""Qwen3-Next."""

from ..family import Family
from ..gate import stated

FAMILY = Family(
    model_type="qwen3_next",
    gate=stated,
    shared_name="shared_expert",
    shared_gate_name="shared_expert_gate",
    norm_offset=1.0,
)
