"""The gates of families, from the configuration as an object of its class, and their check against the real router."""

from typing import Any

from ..merging.gate import Gate
from .family import Config


def plain(config: Any) -> Gate:
    """Softmax over the experts, then the top-k."""
    return Gate(config.num_experts_per_tok)


def renormalised(config: Any) -> Gate:
    """The same, divided by their sum."""
    return Gate(config.num_experts_per_tok, renormalises=True)


def stated(config: Any) -> Gate:
    """The same; whether divided says ``norm_topk_prob``."""
    return Gate(config.num_experts_per_tok, renormalises=bool(config.norm_topk_prob))


def sigmoid_groups(config: Any) -> Gate:
    """DeepSeek-V3's: sigmoid, choice with a bias within the groups whose two best experts are best, scaled."""
    return Gate(
        config.num_experts_per_tok,
        bool(config.norm_topk_prob),
        "sigmoid",
        config.routed_scaling_factor,
        config.n_group,
        config.topk_group,
        best=2,
    )


def ungrouped(config: Config) -> dict[str, Any]:
    """Fields of a model whose experts are in no groups: a merged expert belongs to several."""
    return {name: 1 for name in ("n_group", "topk_group") if name in config}
