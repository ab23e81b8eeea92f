"""Mixtral."""

from ..family import Family
from ..gate import renormalised

FAMILY = Family(
    model_type="mixtral", gate=renormalised, experts_field="num_local_experts", width_field="intermediate_size"
)
