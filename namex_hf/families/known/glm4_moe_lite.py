"""GLM-4.7-Flash."""

from ..family import Family
from ..gate import sigmoid_groups, ungrouped

FAMILY = Family(
    model_type="glm4_moe_lite",
    gate=sigmoid_groups,
    experts_field="n_routed_experts",
    bias="gate.e_score_correction_bias",
    shared_name="shared_experts",
    shared_count="n_shared_experts",
    least=2,  # the router takes the two best experts of a group
    fewer=ungrouped,
)
