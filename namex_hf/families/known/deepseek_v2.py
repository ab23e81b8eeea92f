"""DeepSeek-V2 and V2-Lite."""

from typing import Any

from ...merging.gate import Gate
from ..family import Config, Family
from ..gate import ungrouped


def gate(config: Any) -> Gate:
    """Softmax, scaled; ``group_limited_greedy`` chooses within the groups with the best experts."""
    limited = config.topk_method == "group_limited_greedy"
    groups = (config.n_group, config.topk_group) if limited else (1, 1)
    return Gate(config.num_experts_per_tok, False, "softmax", config.routed_scaling_factor, *groups)


def refuse(config: Config) -> str | None:
    method = config.get("topk_method", "greedy")
    accepted = ("greedy", "group_limited_greedy")
    return None if method in accepted else f"'topk_method' is {method!r}; accepted: {', '.join(accepted)}"


def fewer(config: Config) -> dict[str, Any]:
    return {"topk_method": "greedy", **ungrouped(config)}


FAMILY = Family(
    model_type="deepseek_v2",
    gate=gate,
    experts_field="n_routed_experts",
    shared_name="shared_experts",
    shared_count="n_shared_experts",
    refuse=refuse,
    fewer=fewer,
)
