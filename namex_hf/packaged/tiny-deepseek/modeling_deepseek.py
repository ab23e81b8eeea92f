"""DeepSeek-MoE v1 for transformers 5: loads the Hub's per-expert layout, trains, generates.

The Hub's remote code does not run under transformers 5. This class builds the same architecture from transformers'
own Qwen2-MoE parts. The file imports siblings only by ``from .name import``, so it also travels as remote code.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeAttention,
    Qwen2MoeDecoderLayer,
    Qwen2MoeExperts,
    Qwen2MoeForCausalLM,
    Qwen2MoeMLP,
    Qwen2MoeModel,
    Qwen2MoePreTrainedModel,
    Qwen2MoeRMSNorm,
    Qwen2MoeRotaryEmbedding,
    Qwen2MoeTopKRouter,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .configuration_deepseek import DeepseekConfig

# Without this a class defined outside transformers gets no per-expert -> fused conversion.
register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class DeepseekMoeBlock(nn.Module):
    """Routed experts plus the shared experts, which act on every token without a gate."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.gate = Qwen2MoeTopKRouter(config)
        # DeepSeek never renormalises a single choice: its weight would be 1 whatever the router says.
        self.gate.norm_topk_prob = config.norm_topk_prob and config.num_experts_per_tok > 1
        self.experts = Qwen2MoeExperts(config)
        width = config.shared_expert_intermediate_size
        self.shared_experts = Qwen2MoeMLP(config, intermediate_size=width) if width else None

    def routed(self, flat: torch.Tensor) -> torch.Tensor:
        """Output of the routed experts, ``[tokens, hidden] -> [tokens, hidden]``."""
        _, scores, chosen = self.gate(flat)
        return self.experts(flat, chosen, scores)

    def forward(self, hidden_states: torch.Tensor, *routing: Any) -> torch.Tensor:
        """``[batch, tokens, hidden] -> [batch, tokens, hidden]``. Args: routing, what `routed` takes besides."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.routed(flat, *routing)
        if self.shared_experts is not None:
            output = output + self.shared_experts(flat)
        return output.view_as(hidden_states)


class DeepseekDecoderLayer(Qwen2MoeDecoderLayer):
    moe_block_class = DeepseekMoeBlock

    def __init__(self, config: DeepseekConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.self_attn = Qwen2MoeAttention(config, layer_idx)
        if config.attention_bias:  # DeepSeek's covers the output projection too, Qwen's does not
            self.self_attn.o_proj = nn.Linear(self.self_attn.o_proj.in_features, config.hidden_size)
        if layer_idx in config.mlp_only_layers:
            self.mlp = Qwen2MoeMLP(config, intermediate_size=config.intermediate_size)
        else:
            self.mlp = self.moe_block_class(config)
        self.input_layernorm = Qwen2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_size = config.hidden_size


class DeepseekPreTrainedModel(Qwen2MoePreTrainedModel):
    config: DeepseekConfig
    config_class = DeepseekConfig
    _no_split_modules: ClassVar[list[str]] = ["DeepseekDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "router_logits": OutputRecorder(Qwen2MoeTopKRouter, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": Qwen2MoeAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the text of this file and would fall back to eager experts.
        return True


class DeepseekModel(DeepseekPreTrainedModel, Qwen2MoeModel):
    layer_class = DeepseekDecoderLayer

    def __init__(self, config: DeepseekConfig):
        super(Qwen2MoeModel, self).__init__(config)  # past the parent's, which would build Qwen's layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Qwen2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


def expert_balance_loss(
    router_logits: tuple[torch.Tensor, ...], batch: int, top_k: int, sequence_level: bool
) -> torch.Tensor:
    """DeepSeekMoE's expert-level balance loss, summed over layers (DeepSeekMoE eq. 12-14, without its factor).

    A layer's term is ``sum_i f_i P_i``: ``f_i`` the share of slots that expert i received times N (1 when balanced),
    ``P_i`` its mean probability; per sequence and then averaged where ``sequence_level``, else over all tokens.

    Args:
        router_logits: one ``[batch * tokens, experts]`` tensor per MoE layer.
    """
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        probabilities = logits.to(total.device).float().softmax(-1)
        probabilities = probabilities.view(batch if sequence_level else 1, -1, logits.shape[-1])
        chosen = probabilities.topk(top_k, dim=-1).indices
        slots = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0)
        frequency = slots.mean(1) * (logits.shape[-1] / top_k)
        total = total + (frequency * probabilities.mean(1)).sum(-1).mean()
    return total


class DeepseekForCausalLM(DeepseekPreTrainedModel, Qwen2MoeForCausalLM):
    model_class = DeepseekModel

    def __init__(self, config: DeepseekConfig):
        super(Qwen2MoeForCausalLM, self).__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # The parent's forward adds Qwen's auxiliary loss, which pools all layers; this one adds DeepSeek's. Every argument
    # is named because `Trainer` and `generate` read the signature.
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """As `Qwen2MoeForCausalLM.forward`; ``aux_loss`` is `expert_balance_loss` (padding counted, as theirs)."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits and outputs.router_logits:
            aux_loss = expert_balance_loss(
                outputs.router_logits, len(hidden_states), self.config.num_experts_per_tok, self.config.seq_aux
            )
            if loss is not None:
                loss = loss + self.config.aux_loss_alpha * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


__all__ = ["DeepseekForCausalLM", "DeepseekModel", "DeepseekPreTrainedModel"]
