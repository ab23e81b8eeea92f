"""Hunyuan-A13B. ``moe_topk`` may be a list with an entry a layer; all have to be equal."""

from typing import Any

from ...merging.gate import Gate
from ..family import Family


def gate(config: Any) -> Gate:
    top_k = config.moe_topk
    return Gate(top_k if isinstance(top_k, int) else top_k[0], renormalises=True)


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    gate=gate,
    top_k_field="moe_topk",
    width_field="intermediate_size",
    router="gate.wg.weight",
    shared_name="shared_mlp",
    narrows=False,  # the shared expert has the same width
)
