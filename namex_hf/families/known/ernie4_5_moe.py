"""Ernie 4.5: a correction bias is added to the softmax."""

from ..family import Family
from ..gate import renormalised

FAMILY = Family(
    model_type="ernie4_5_moe",
    gate=renormalised,
    experts_field="moe_num_experts",
    top_k_field="moe_k",
    bias="gate.moe_statics.e_score_correction_bias",
    shared_name="shared_experts",
    shared_count="moe_num_shared_experts",
)
