"""GLM-4.7-Flash."""

from dataclasses import replace

from .deepseek_v3 import FAMILY as DEEPSEEK_V3

FAMILY = replace(DEEPSEEK_V3, model_type="glm4_moe_lite")
