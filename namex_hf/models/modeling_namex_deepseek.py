"""DeepSeek-MoE v1 patched, under ``merge: residual`` or ``soft`` (``namex_deepseek``).

The file imports siblings only by ``from .name import``, so that it also travels as remote code.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_namex import NamexDeepseekConfig, soft_choice
from .modeling_deepseek import (
    DeepseekDecoderLayer,
    DeepseekForCausalLM,
    DeepseekModel,
    DeepseekMoeBlock,
    DeepseekPreTrainedModel,
)
from .residual import ResidualRouting
from .soft import SegmentedLayer, SegmentedModel, SoftRouting
from .soft_cache import LayerMemory
from .soft_curvature import CalibratedCurvature
from .soft_segments import Segments

# Without this a class defined outside transformers gets no per-expert -> fused conversion.
register_checkpoint_conversion_mapping("namex_deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class NamexDeepseekMoeBlock(ResidualRouting, DeepseekMoeBlock):
    """Routed experts, the base expert, and the shared experts as in the original."""

    def __init__(self, config: NamexDeepseekConfig):
        super().__init__(config)
        self.add_base_expert(config)


class SoftDeepseekMoeBlock(SoftRouting, DeepseekMoeBlock):
    """One merged expert a segment, and the shared experts as in the original."""

    def __init__(self, config: NamexDeepseekConfig):
        super().__init__(config)
        self.add_soft(config)

    def forward(self, hidden_states: torch.Tensor, segments: Segments, memory: LayerMemory | None) -> torch.Tensor:
        """``[batch, tokens, hidden] -> [batch, tokens, hidden]``."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.routed(flat, segments, memory)
        if self.shared_experts is not None:
            output = output + self.shared_experts(flat)
        return output.view_as(hidden_states)


def moe_block(config: NamexDeepseekConfig) -> nn.Module:
    """The block that the recipe asks for."""
    return SoftDeepseekMoeBlock(config) if soft_choice(config.namex) is not None else NamexDeepseekMoeBlock(config)


class NamexDeepseekDecoderLayer(SegmentedLayer, DeepseekDecoderLayer):
    moe_block_class = staticmethod(moe_block)


class NamexDeepseekPreTrainedModel(DeepseekPreTrainedModel):
    # The base expert is made of nn.Linear, which the inherited `_init_weights` covers.
    config: NamexDeepseekConfig
    config_class = NamexDeepseekConfig
    _no_split_modules: ClassVar[list[str]] = ["NamexDeepseekDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CalibratedCurvature):
            module.reset_parameters()


class NamexDeepseekModel(SegmentedModel, NamexDeepseekPreTrainedModel, DeepseekModel):
    layer_class = NamexDeepseekDecoderLayer


class NamexDeepseekForCausalLM(NamexDeepseekPreTrainedModel, DeepseekForCausalLM):
    model_class = NamexDeepseekModel


__all__ = ["NamexDeepseekForCausalLM", "NamexDeepseekModel", "NamexDeepseekPreTrainedModel"]
