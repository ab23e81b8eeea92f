"""Configurations of the patched models: the family's own fields, and the recipe under ``namex``."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig

from .configuration_deepseek import DeepseekConfig


def check_merge(recipe: dict[str, Any] | None, norm_topk_prob: bool) -> None:
    """Refuse what the residual block cannot compute; no recipe means its default, ``merge: residual``.

    Raises:
        ValueError: another merge, or a router that renormalises its top-k.
    """
    merge = (recipe or {}).get("merge", "residual")
    if merge != "residual":
        raise ValueError(f"namex.merge is {merge!r}; this model class computes 'residual' only")
    if norm_topk_prob:
        raise ValueError(
            "norm_topk_prob is true: the top-k weights then sum to 1 and leave no mass for the base expert of "
            "'merge: residual'; accepted is norm_topk_prob: false"
        )


@strict
class NamexQwen2MoeConfig(Qwen2MoeConfig):
    """A Qwen2-MoE with a base expert in every MoE layer; ``namex`` holds the recipe that made it."""

    model_type = "namex_qwen2_moe"
    remote_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_namex.NamexQwen2MoeConfig",
        "AutoModel": "modeling_namex_qwen2_moe.NamexQwen2MoeModel",
        "AutoModelForCausalLM": "modeling_namex_qwen2_moe.NamexQwen2MoeForCausalLM",
    }

    namex: dict | None = None

    def __post_init__(self, **kwargs):
        check_merge(self.namex, self.norm_topk_prob)
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As the parent's, with the whole ``auto_map``: transformers alone would leave out ``AutoModel``."""
        self.auto_map = dict(self.remote_classes)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


@strict
class NamexDeepseekConfig(DeepseekConfig):
    """A DeepSeek-MoE v1 with a base expert in every MoE layer; ``namex`` holds the recipe that made it."""

    model_type = "namex_deepseek"
    remote_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_namex.NamexDeepseekConfig",
        "AutoModel": "modeling_namex_deepseek.NamexDeepseekModel",
        "AutoModelForCausalLM": "modeling_namex_deepseek.NamexDeepseekForCausalLM",
    }

    namex: dict | None = None

    def __post_init__(self, **kwargs):
        check_merge(self.namex, self.norm_topk_prob)
        super().__post_init__(**kwargs)


__all__ = ["NamexDeepseekConfig", "NamexQwen2MoeConfig"]
