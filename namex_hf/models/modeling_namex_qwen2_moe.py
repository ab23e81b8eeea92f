"""Patched Qwen2-MoE (``namex_qwen2_moe``), with another merge or routing than the original.

The file imports siblings only by ``from .name import``, so that it also travels as remote code.
"""

from functools import wraps
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeAttention,
    Qwen2MoeDecoderLayer,
    Qwen2MoeForCausalLM,
    Qwen2MoeModel,
    Qwen2MoePreTrainedModel,
    Qwen2MoeRMSNorm,
    Qwen2MoeRotaryEmbedding,
    Qwen2MoeSparseMoeBlock,
    Qwen2MoeTopKRouter,
)
from transformers.utils.output_capturing import OutputRecorder

from .arguments import Arguments
from .configuration_namex import NamexQwen2MoeConfig, soft_choice, soft_choice_at
from .patched_model import PatchedModel
from .routers import CosineRouter
from .soft import SegmentedCausalLM, SegmentedLayer, SegmentedModel, SoftRouting, experts_class
from .sparse import SparseRouting, set_expert_count

# A class defined outside transformers gets no per-expert -> fused conversion by itself.
register_checkpoint_conversion_mapping(
    "namex_qwen2_moe", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)


class GatedSharedBlock(Qwen2MoeSparseMoeBlock):
    """The gated shared expert as in the original; a mixin defines the routed part."""

    def forward(self, hidden_states: torch.Tensor, *routing: Any, **base: Any) -> torch.Tensor:
        """``[batch, tokens, hidden] -> [batch, tokens, hidden]``. Args: routing, base: more arguments of `routed`."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        shared = F.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return (self.routed(flat, *routing, **base) + shared).view_as(hidden_states)


class NamexQwen2MoeSparseMoeBlock(SparseRouting, GatedSharedBlock):
    """Top-k experts, and the base expert if the recipe has one."""

    def __init__(self, config: NamexQwen2MoeConfig, layer_idx: int):
        super().__init__(config)
        self.add_parts(config, layer_idx)


class SoftQwen2MoeSparseMoeBlock(SoftRouting, GatedSharedBlock):
    """A merged expert for every token or segment."""

    def __init__(self, config: NamexQwen2MoeConfig):
        super().__init__(config)
        choice = soft_choice(config.namex)
        assert choice is not None
        self.experts = experts_class(choice)(config)
        self.add_parts(config)


class NamexQwen2MoeDecoderLayer(SegmentedLayer, Qwen2MoeDecoderLayer):
    mlp: nn.Module

    def __init__(self, config: NamexQwen2MoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if isinstance(self.mlp, Qwen2MoeSparseMoeBlock):
            soft = soft_choice_at(config, layer_idx) is not None
            self.mlp = SoftQwen2MoeSparseMoeBlock(config) if soft else NamexQwen2MoeSparseMoeBlock(config, layer_idx)
            set_expert_count(self.mlp, config, layer_idx)


class NamexQwen2MoePreTrainedModel(PatchedModel, Qwen2MoePreTrainedModel):
    config: NamexQwen2MoeConfig
    config_class = NamexQwen2MoeConfig
    _no_split_modules: ClassVar[list[str]] = ["NamexQwen2MoeDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "router_logits": [OutputRecorder(Qwen2MoeTopKRouter, index=0), OutputRecorder(CosineRouter, index=0)],
        "hidden_states": NamexQwen2MoeDecoderLayer,
        "attentions": Qwen2MoeAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches this file's text for its decorator; without it, it would use eager experts.
        return True


class NamexQwen2MoeModel(SegmentedModel, NamexQwen2MoePreTrainedModel, Qwen2MoeModel):
    def __init__(self, config: NamexQwen2MoeConfig):
        super(Qwen2MoeModel, self).__init__(config)  # skip the parent's, which would build Qwen's layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([NamexQwen2MoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Qwen2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


FORWARD = Arguments.of(Qwen2MoeForCausalLM.forward)


class NamexQwen2MoeForCausalLM(SegmentedCausalLM, NamexQwen2MoePreTrainedModel, Qwen2MoeForCausalLM):
    def __init__(self, config: NamexQwen2MoeConfig):
        super(Qwen2MoeForCausalLM, self).__init__(config)
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

    def __init__(self, config: NamexQwen2MoeConfig):
        # Skip the parent's, which uses `AutoModel`: that does not know a class of remote code.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = NamexQwen2MoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = [
    "NamexQwen2MoeForCausalLM",
    "NamexQwen2MoeForSequenceClassification",
    "NamexQwen2MoeModel",
    "NamexQwen2MoePreTrainedModel",
]
