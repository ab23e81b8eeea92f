"""Qwen3-MoE."""

from ..family import Family
from ..gate import stated

FAMILY = Family(model_type="qwen3_moe", gate=stated)
