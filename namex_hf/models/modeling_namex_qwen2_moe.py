"""Patched Qwen2-MoE (``namex_qwen2_moe``), with another merge or routing than the original.

The file imports siblings only by ``from .name import``, so that it also travels as remote code.
"""

from functools import wraps
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeDecoderLayer,
    Qwen2MoeForCausalLM,
    Qwen2MoeModel,
    Qwen2MoePreTrainedModel,
    Qwen2MoeSparseMoeBlock,
)

from .arguments import Arguments
from .configuration_namex import NamexQwen2MoeConfig
from .patched_model import PatchedModel, SegmentedCausalLM, SegmentedLayer, SegmentedModel
from .soft import SoftRouting
from .sparse import SparseRouting

# A class defined outside transformers gets no per-expert -> fused conversion by itself.
register_checkpoint_conversion_mapping(
    "namex_qwen2_moe", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)


class GatedSharedBlock(Qwen2MoeSparseMoeBlock):
    """The gated shared expert as in the original; a mixin defines the routed part."""

    def forward(self, hidden_states: Tensor, *routing: Any, **base: Any) -> Tensor:
        """``[batch, tokens, hidden] -> [batch, tokens, hidden]``. Args: routing, base: more arguments of `routed`."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        shared = F.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return (self.routed(flat, *routing, **base) + shared).view_as(hidden_states)


class NamexQwen2MoeSparseMoeBlock(SparseRouting, GatedSharedBlock):
    """Top-k experts, and the base expert if the recipe has one."""


class SoftQwen2MoeSparseMoeBlock(SoftRouting, GatedSharedBlock):
    """A merged expert for every token or segment."""


class NamexQwen2MoeDecoderLayer(SegmentedLayer, Qwen2MoeDecoderLayer):
    sparse_block = NamexQwen2MoeSparseMoeBlock
    soft_block = SoftQwen2MoeSparseMoeBlock


class NamexQwen2MoePreTrainedModel(PatchedModel, Qwen2MoePreTrainedModel):
    config_class = NamexQwen2MoeConfig
    layer_class = NamexQwen2MoeDecoderLayer
    _no_split_modules: ClassVar[list[str]] = ["NamexQwen2MoeDecoderLayer"]


class NamexQwen2MoeModel(SegmentedModel, NamexQwen2MoePreTrainedModel, Qwen2MoeModel):
    pass


FORWARD = Arguments.of(Qwen2MoeForCausalLM.forward)


class NamexQwen2MoeForCausalLM(SegmentedCausalLM, NamexQwen2MoePreTrainedModel, Qwen2MoeForCausalLM):
    def __init__(self, config: NamexQwen2MoeConfig):
        super(Qwen2MoeForCausalLM, self).__init__(config)  # skip the parent's, which would build Qwen's model
        self.model = NamexQwen2MoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    @wraps(Qwen2MoeForCausalLM.forward)
    def forward(self, *args, **kwargs):
        """As the stock model's, without auxiliary loss in a pass that continues a cache.

        In such a pass the stock model fails, because the mask covers more tokens than the pass has.
        """
        kwargs = FORWARD.by_name(args, kwargs)
        has_logits, cache = kwargs.get("output_router_logits"), kwargs.get(FORWARD.cache)
        has_logits = self.config.output_router_logits if has_logits is None else has_logits
        if has_logits and cache is not None and cache.get_seq_length():
            kwargs["output_router_logits"] = False
        return super().forward(**kwargs)


class NamexQwen2MoeForSequenceClassification(GenericForSequenceClassification, NamexQwen2MoePreTrainedModel):
    """A reward model, or another classifier, with transformers' own head."""


AutoModel.register(NamexQwen2MoeConfig, NamexQwen2MoeModel, exist_ok=True)  # the classifier builds its body by it
