"""FlexOLMo: the router reads the hidden states themselves, and a norm follows the experts."""

from ..family import Family
from ..gate import stated

FAMILY = Family(model_type="flex_olmo", gate=stated, width_field="intermediate_size", norm=None, linear=False)
