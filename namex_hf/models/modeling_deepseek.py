"""DeepSeek-MoE v1 for transformers 5: loads the Hub's per-expert layout, trains, generates.

The Hub's remote code does not run under transformers 5. This class builds the same architecture from transformers'
own Qwen2-MoE parts. The file imports siblings only by ``from .name import``, so it also travels as remote code.
"""

from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
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

from .arguments import Arguments
from .configuration_deepseek import DeepseekConfig

# A class defined outside transformers gets no per-expert -> fused conversion by itself.
register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class DeepseekMoeBlock(nn.Module):
    """Routed experts, and shared experts that act on every token without a gate."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.gate = Qwen2MoeTopKRouter(config)
        self.gate.norm_topk_prob = config.renormalises
        self.experts = Qwen2MoeExperts(config)
        width = config.shared_expert_intermediate_size
        self.shared_experts = Qwen2MoeMLP(config, intermediate_size=width) if width else None

    def routed(self, flat: Tensor) -> Tensor:
        """Output of the routed experts, ``[tokens, hidden] -> [tokens, hidden]``."""
        _, scores, chosen = self.gate(flat)
        return self.experts(flat, chosen, scores)

    def forward(self, hidden_states: Tensor, *routing: Any, **base: Any) -> Tensor:
        """``[batch, tokens, hidden] -> [batch, tokens, hidden]``. Args: routing, base: more arguments of `routed`."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.routed(flat, *routing, **base)
        if self.shared_experts is not None:
            output = output + self.shared_experts(flat)
        return output.view_as(hidden_states)


class DeepseekDecoderLayer(Qwen2MoeDecoderLayer):
    def __init__(self, config: DeepseekConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.self_attn = Qwen2MoeAttention(config, layer_idx)
        if config.attention_bias:  # DeepSeek has a bias on the output projection too, Qwen has not
            self.self_attn.o_proj = nn.Linear(self.self_attn.o_proj.in_features, config.hidden_size)
        if layer_idx in config.mlp_only_layers:
            self.mlp = Qwen2MoeMLP(config, intermediate_size=config.intermediate_size)
        else:
            self.mlp = DeepseekMoeBlock(config)
        self.input_layernorm = Qwen2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_size = config.hidden_size


class DeepseekPreTrainedModel(Qwen2MoePreTrainedModel):
    config_class = DeepseekConfig
    _no_split_modules: ClassVar[list[str]] = ["DeepseekDecoderLayer"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches this file's text for its decorator; without it, it would use eager experts.
        return True


class DeepseekModel(DeepseekPreTrainedModel, Qwen2MoeModel):
    layer_class = DeepseekDecoderLayer

    def __init__(self, config: DeepseekConfig):
        super(Qwen2MoeModel, self).__init__(config)  # skip the parent's, which would build Qwen's layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Qwen2MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


def expert_balance_loss(router_logits: tuple[Tensor, ...], batch: int, top_k: int, sequence_level: bool) -> Tensor:
    """DeepSeekMoE's expert-level balance loss, summed over layers (DeepSeekMoE eq. 12-14, without its factor).

    A layer's term is ``sum_i f_i P_i``: ``f_i`` is the share of slots that expert i received times N (1 when balanced),
    ``P_i`` its mean probability. Under ``sequence_level`` the terms of sequences are averaged; else all tokens count
    together.

    Args:
        router_logits: ``[batch * tokens, experts]``, a tensor for every MoE layer.
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


def select_positions(hidden_states: Tensor, keep: int | Tensor) -> Tensor:
    """The hidden states that get logits: `slice_logits_to_keep` of transformers, which 5.19 and older lack.

    Args:
        hidden_states: ``[batch, tokens, hidden]``.
        keep: the number of last positions, 0 for all; positions ``[positions]`` or ``[batch, positions]``; or a boolean
            mask ``[batch, tokens]``, which makes the result ``[positions, hidden]``.
    """
    if isinstance(keep, int):
        return hidden_states[:, -keep:]
    if keep.ndim == 1:
        return hidden_states[:, keep]
    return hidden_states[keep] if keep.dtype == torch.bool else hidden_states.take_along_dim(keep[..., None], dim=1)


FORWARD = Arguments.of(Qwen2MoeForCausalLM.forward)


class DeepseekForCausalLM(DeepseekPreTrainedModel, Qwen2MoeForCausalLM):
    model_class = DeepseekModel

    def __init__(self, config: DeepseekConfig):
        super(Qwen2MoeForCausalLM, self).__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # The parent's forward adds Qwen's auxiliary loss, which pools all layers; this forward adds DeepSeek's. `Trainer`
    # and `generate` read the parent's signature, which `wraps` passes on.
    @can_return_tuple
    @wraps(Qwen2MoeForCausalLM.forward)
    def forward(self, *args, **kwargs) -> MoeCausalLMOutputWithPast:
        """As `Qwen2MoeForCausalLM.forward`; ``aux_loss`` is `expert_balance_loss`, which also counts padding."""
        kwargs = FORWARD.by_name(args, kwargs)
        labels, keep = kwargs.pop("labels", None), kwargs.pop("logits_to_keep", 0)
        if kwargs.get("output_router_logits") is None:
            kwargs["output_router_logits"] = self.config.output_router_logits
        outputs = dict(self.model(**kwargs, return_dict=True))
        hidden_states = outputs.pop("last_hidden_state")
        logits = self.lm_head(select_positions(hidden_states, keep))
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if kwargs["output_router_logits"] and outputs.get("router_logits"):
            aux_loss = expert_balance_loss(
                outputs["router_logits"], len(hidden_states), self.config.num_experts_per_tok, self.config.seq_aux
            )
            if loss is not None:
                loss = loss + self.config.aux_loss_alpha * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **outputs)


class DeepseekForSequenceClassification(GenericForSequenceClassification, DeepseekPreTrainedModel):
    """A reward model, or another classifier, with transformers' own head."""


AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)  # the classifier builds its body by it
