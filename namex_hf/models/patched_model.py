"""Classes that the patched models of all families share.

A patched model is a stock model whose layers have other classes, and its MoE blocks further parts: the constructor
builds the stock model and converts it, as `convert.patch_classes` converts one in memory.
"""

from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeDecoderLayer,
    Qwen2MoeModel,
    Qwen2MoePreTrainedModel,
    Qwen2MoeTopKRouter,
)
from transformers.utils.output_capturing import OutputRecorder

from .arguments import Arguments, cache_in
from .configuration_namex import SoftChoice, check_merge, routing_of, soft_choice, soft_choice_at
from .routers import ChosenRouting, CosineRouter, StableRouter
from .soft import SoftExperts, SoftRouting
from .soft_cache import SoftCache, soft_cache
from .soft_curvature import CalibratedCurvature
from .soft_kronecker import KroneckerProducts
from .soft_segments import History, Segments, plan_segments
from .soft_token import TokenExperts
from .sparse import set_expert_count

LAYER_FORWARD = Arguments.of(Qwen2MoeDecoderLayer.forward)
MODEL_FORWARD = Arguments.of(Qwen2MoeModel.forward)
PREFILL = "reads_prompt"
"""Argument that is true in a pass of `generate` over the prompt, or a part of it."""


class SegmentedLayer:
    """Mixin for a decoder layer: passes token ids and the layout of segments to its MoE block."""

    sparse_block: type
    soft_block: type
    self_attn: Any
    mlp: Any
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, *args, segments: Segments | None = None, token_ids: Tensor | None = None, **kwargs) -> Tensor:
        """As the stock layer's; `segments` and `token_ids` go to the block, all other arguments to attention."""
        kwargs = LAYER_FORWARD.by_name(args, kwargs)
        hidden_states = self.attended(**kwargs)
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.mlp(normed, *self.routing(segments, token_ids, cache_in(kwargs)))

    def attended(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """The layer up to its second norm: the hidden states plus attention."""
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + attention

    def routing(self, segments: Segments | None, token_ids: Tensor | None, cache: Any) -> tuple[Any, ...]:
        """The arguments of the block after the hidden states; none in a dense layer."""
        if not isinstance(self.mlp, ChosenRouting):
            return ()
        if segments is None or not isinstance(self.mlp, SoftRouting):
            return (token_ids,)
        return token_ids, segments, None if cache is None else cache.memories[self.self_attn.layer_idx]

    def patch(self, config: Any, index: int) -> None:
        """Give the MoE block its patched class and its new parts, without values. Args: index, of this layer."""
        block = self.mlp
        weight, stock_parts = block.gate.weight, set(block.children())
        if soft := soft_choice_at(config, index):
            block.__class__ = self.soft_block
            block.experts.__class__ = TokenExperts if soft.segment is None else SoftExperts
            block.add_parts(config)
        else:
            block.__class__ = self.sparse_block
            block.add_parts(config, index)
        set_expert_count(block, config, index)
        for part in set(block.children()) - stock_parts:
            part.to(device=weight.device, dtype=weight.dtype).train(block.training)


class PatchedModel:
    """Mixin for a pretrained model."""

    layer_class: type[SegmentedLayer]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        **Qwen2MoePreTrainedModel._can_record_outputs,
        "router_logits": [OutputRecorder(Qwen2MoeTopKRouter, index=0), OutputRecorder(CosineRouter, index=0)],
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches the text of the model's file for its decorator; without it, it would use eager experts.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The base expert consists of nn.Linear modules, which the family's own method initialises.
        super()._init_weights(module)
        if isinstance(module, (CosineRouter, StableRouter, CalibratedCurvature, KroneckerProducts)):
            module.reset_parameters()

    def resize_token_embeddings(self: Any, *args, **kwargs):
        """As the stock model's; routers with a table of token ids are resized too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, StableRouter):
                module.resize(self.config.vocab_size)
        return embeddings


class SegmentedModel(PatchedModel):
    """Mixin for a model without its head: passes token ids on, and lays the pass out once for all layers."""

    config: Any
    training: bool
    gradient_checkpointing: bool

    def __init__(self: Any, *config):
        super().__init__(*config)
        self.patch()
        self.post_init()

    def patch(self: Any) -> None:
        """Give the stock layers and MoE blocks their patched classes and new parts, without values."""
        check_merge(self.config, self.config.namex)  # a field may have been changed after the configuration checked it
        for index, layer in enumerate(self.layers):
            layer.__class__ = self.layer_class
            if hasattr(layer.mlp, "experts"):
                layer.patch(self.config, index)

    @wraps(Qwen2MoeModel.forward)
    def forward(self, *args, **kwargs):
        """As the stock model's. Under ``merge: soft`` only a 2D `attention_mask` marks padding.

        A `DynamicCache` argument becomes a `SoftCache`, in place.
        """
        kwargs = MODEL_FORWARD.by_name(args, kwargs)
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = embeddings if ids is None else ids
        choice, prefill = soft_choice(self.config.namex), kwargs.pop(PREFILL, False)
        if given is not None and choice is not None and choice.segment is not None:
            cache = kwargs.get(MODEL_FORWARD.cache)
            if cache is not None:
                cache = soft_cache(cache)
            elif self._makes_cache(kwargs.get("use_cache")):
                kwargs[MODEL_FORWARD.cache] = cache = SoftCache(config=self.config)
            mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
            kwargs["segments"] = self._lay_out(choice, given, mask, positions, cache, prefill)
        if routing_of(self.config.namex) == "stable":
            kwargs["token_ids"] = ids
        return super().forward(**kwargs)

    def _makes_cache(self, use_cache: bool | None) -> bool:
        """Whether the stock model would create a cache: not under gradient checkpointing."""
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        return bool(self.config.use_cache if use_cache is None else use_cache) and not recomputes

    @torch.compiler.disable  # the numbers of runs and groups are data: a single graph break, not one for each number
    @torch.no_grad()
    def _lay_out(
        self,
        choice: SoftChoice,
        given: Tensor,
        attention_mask,
        position_ids,
        cache: SoftCache | None,
        prefill: bool = False,
    ) -> Segments:
        batch, new = given.shape[:2]
        real = torch.ones(batch, new, dtype=torch.bool, device=given.device)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            real = attention_mask[:, -new:].to(given.device) != 0
        if position_ids is not None:
            position_ids = position_ids.to(given.device).expand(batch, -1)
        history = None if cache is None else cache.history
        if history is None:
            history = History.empty(batch, given.device)
        # In training nothing reads the cache later: it must not hold merged experts until the step ends.
        keep = cache is not None and not self.training
        assert choice.segment is not None
        segments, history = plan_segments(history, real, position_ids, choice.segment, choice.span, keep, prefill)
        if cache is not None:
            cache.history = history
        return segments


class SegmentedCausalLM:
    """Mixin for a causal language model: marks the passes of `generate` that read the prompt."""

    config: Any

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        """As `GenerationMixin`'s. Under ``prefill_chunk_size`` several passes read the prompt."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        choice = soft_choice(self.config.namex)
        if choice is not None and choice.segment is not None and kwargs.get("is_first_iteration"):
            inputs[PREFILL] = True
        return inputs
