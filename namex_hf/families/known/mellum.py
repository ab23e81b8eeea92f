"""Mellum."""

from ..family import Family
from ..gate import stated

FAMILY = Family(model_type="mellum", gate=stated)
