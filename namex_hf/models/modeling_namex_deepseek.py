"""Patched DeepSeek-MoE v1 (``namex_deepseek``), with another merge or routing than the original.

The file imports siblings only by ``from .name import``, so that it also travels as remote code.
"""

from typing import ClassVar

from transformers import AutoModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_namex import NamexDeepseekConfig
from .modeling_deepseek import (
    DeepseekDecoderLayer,
    DeepseekForCausalLM,
    DeepseekForSequenceClassification,
    DeepseekModel,
    DeepseekMoeBlock,
    DeepseekPreTrainedModel,
)
from .patched_model import PatchedModel, SegmentedCausalLM, SegmentedLayer, SegmentedModel
from .soft import SoftRouting
from .sparse import SparseRouting

# A class defined outside transformers gets no per-expert -> fused conversion by itself.
register_checkpoint_conversion_mapping("namex_deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class NamexDeepseekMoeBlock(SparseRouting, DeepseekMoeBlock):
    """Top-k experts, the base expert if the recipe has one, and the shared experts as in the original."""


class SoftDeepseekMoeBlock(SoftRouting, DeepseekMoeBlock):
    """A merged expert for every token or segment, and the shared experts as in the original."""


class NamexDeepseekDecoderLayer(SegmentedLayer, DeepseekDecoderLayer):
    sparse_block = NamexDeepseekMoeBlock
    soft_block = SoftDeepseekMoeBlock


class NamexDeepseekPreTrainedModel(PatchedModel, DeepseekPreTrainedModel):
    config_class = NamexDeepseekConfig
    layer_class = NamexDeepseekDecoderLayer
    _no_split_modules: ClassVar[list[str]] = ["NamexDeepseekDecoderLayer"]


class NamexDeepseekModel(SegmentedModel, NamexDeepseekPreTrainedModel, DeepseekModel):
    pass


class NamexDeepseekForCausalLM(SegmentedCausalLM, NamexDeepseekPreTrainedModel, DeepseekForCausalLM):
    model_class = NamexDeepseekModel


class NamexDeepseekForSequenceClassification(NamexDeepseekPreTrainedModel, DeepseekForSequenceClassification):
    pass


AutoModel.register(NamexDeepseekConfig, NamexDeepseekModel, exist_ok=True)  # the classifier builds its body by it
