"""Patched DeepSeek-MoE v1 (``namex_deepseek``), with another merge or routing than the original.

The file imports siblings only by ``from .name import``, so that it also travels as remote code.
"""

from typing import Any, ClassVar

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.utils.output_capturing import OutputRecorder

from .configuration_namex import NamexDeepseekConfig, soft_choice, soft_choice_at
from .modeling_deepseek import (
    DeepseekDecoderLayer,
    DeepseekForCausalLM,
    DeepseekForSequenceClassification,
    DeepseekModel,
    DeepseekMoeBlock,
    DeepseekPreTrainedModel,
)
from .patched_model import PatchedModel
from .routers import CosineRouter
from .soft import SegmentedCausalLM, SegmentedLayer, SegmentedModel, SoftRouting, experts_class
from .sparse import SparseRouting, set_expert_count

# A class defined outside transformers gets no per-expert -> fused conversion by itself.
register_checkpoint_conversion_mapping("namex_deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class NamexDeepseekMoeBlock(SparseRouting, DeepseekMoeBlock):
    """Top-k experts, the base expert if the recipe has one, and the shared experts as in the original."""

    def __init__(self, config: NamexDeepseekConfig, layer_idx: int):
        super().__init__(config)
        self.add_parts(config, layer_idx)


class SoftDeepseekMoeBlock(SoftRouting, DeepseekMoeBlock):
    """A merged expert for every token or segment, and the shared experts as in the original."""

    def __init__(self, config: NamexDeepseekConfig):
        super().__init__(config)
        choice = soft_choice(config.namex)
        assert choice is not None
        self.experts = experts_class(choice)(config)
        self.add_parts(config)


class NamexDeepseekDecoderLayer(SegmentedLayer, DeepseekDecoderLayer):
    mlp: nn.Module

    def __init__(self, config: NamexDeepseekConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if isinstance(self.mlp, DeepseekMoeBlock):
            soft = soft_choice_at(config, layer_idx) is not None
            self.mlp = SoftDeepseekMoeBlock(config) if soft else NamexDeepseekMoeBlock(config, layer_idx)
            set_expert_count(self.mlp, config, layer_idx)


class NamexDeepseekPreTrainedModel(PatchedModel, DeepseekPreTrainedModel):
    config: NamexDeepseekConfig
    config_class = NamexDeepseekConfig
    _no_split_modules: ClassVar[list[str]] = ["NamexDeepseekDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        **DeepseekPreTrainedModel._can_record_outputs,
        "router_logits": [OutputRecorder(Qwen2MoeTopKRouter, index=0), OutputRecorder(CosineRouter, index=0)],
    }


class NamexDeepseekModel(SegmentedModel, NamexDeepseekPreTrainedModel, DeepseekModel):
    layer_class = NamexDeepseekDecoderLayer


class NamexDeepseekForCausalLM(SegmentedCausalLM, NamexDeepseekPreTrainedModel, DeepseekForCausalLM):
    model_class = NamexDeepseekModel


class NamexDeepseekForSequenceClassification(NamexDeepseekPreTrainedModel, DeepseekForSequenceClassification):
    model_class = NamexDeepseekModel


__all__ = [
    "NamexDeepseekForCausalLM",
    "NamexDeepseekForSequenceClassification",
    "NamexDeepseekModel",
    "NamexDeepseekPreTrainedModel",
]
