"""Jamba. With one expert its class is another one, without a router."""

from ..family import Family
from ..gate import plain

FAMILY = Family(
    model_type="jamba",
    gate=plain,
    width_field="intermediate_size",
    router="router.weight",
    norm="pre_ff_layernorm.weight",
    narrows=False,  # dense layers have the same width
    least=2,
)
