"""DeepSeek-MoE v1 with a base expert that takes the mass which top-k leaves over (``model_type: namex_deepseek``).

The file imports siblings only by ``from .name import``, so that it also travels as remote code.
"""

from typing import ClassVar

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_namex import NamexDeepseekConfig
from .modeling_deepseek import (
    DeepseekDecoderLayer,
    DeepseekForCausalLM,
    DeepseekModel,
    DeepseekMoeBlock,
    DeepseekPreTrainedModel,
)
from .residual import ResidualRouting

# Without this a class defined outside transformers gets no per-expert -> fused conversion.
register_checkpoint_conversion_mapping("namex_deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class NamexDeepseekMoeBlock(ResidualRouting, DeepseekMoeBlock):
    """Routed experts, the base expert, and the shared experts as in the original."""

    def __init__(self, config: NamexDeepseekConfig):
        super().__init__(config)
        self.add_base_expert(config)


class NamexDeepseekDecoderLayer(DeepseekDecoderLayer):
    moe_block_class = NamexDeepseekMoeBlock


class NamexDeepseekPreTrainedModel(DeepseekPreTrainedModel):
    # The base expert is made of nn.Linear, which the inherited `_init_weights` covers.
    config: NamexDeepseekConfig
    config_class = NamexDeepseekConfig
    _no_split_modules: ClassVar[list[str]] = ["NamexDeepseekDecoderLayer"]


class NamexDeepseekModel(NamexDeepseekPreTrainedModel, DeepseekModel):
    layer_class = NamexDeepseekDecoderLayer


class NamexDeepseekForCausalLM(NamexDeepseekPreTrainedModel, DeepseekForCausalLM):
    model_class = NamexDeepseekModel


__all__ = ["NamexDeepseekForCausalLM", "NamexDeepseekModel", "NamexDeepseekPreTrainedModel"]
