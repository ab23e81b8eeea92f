"""GLM-4.5 to 4.7."""

from dataclasses import replace

from .deepseek_v3 import FAMILY as DEEPSEEK_V3

FAMILY = replace(DEEPSEEK_V3, model_type="glm4_moe")
