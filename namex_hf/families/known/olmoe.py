"""OLMoE."""

from ..family import Family
from ..gate import stated

FAMILY = Family(model_type="olmoe", gate=stated, width_field="intermediate_size")
