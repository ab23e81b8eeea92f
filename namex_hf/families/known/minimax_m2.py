"""MiniMax-M2."""

from typing import Any

from ...merging.gate import Gate
from ..family import Family


def gate(config: Any) -> Gate:
    return Gate(config.num_experts_per_tok, True, "sigmoid")


FAMILY = Family(
    model_type="minimax_m2",
    gate=gate,
    experts_field="num_local_experts",
    width_field="intermediate_size",
    bias="e_score_correction_bias",
)
