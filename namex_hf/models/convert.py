"""A live model of a family becomes its patched class, in place and without a copy of what it holds."""

from typing import Any

from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeForCausalLM,
    Qwen2MoeMLP,
    Qwen2MoeSparseMoeBlock,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .configuration_namex import NamexDeepseekConfig, NamexQwen2MoeConfig, check_merge
from .modeling_deepseek import DeepseekForCausalLM, DeepseekMoeBlock
from .modeling_namex_deepseek import (
    NamexDeepseekDecoderLayer,
    NamexDeepseekForCausalLM,
    NamexDeepseekModel,
    NamexDeepseekMoeBlock,
)
from .modeling_namex_qwen2_moe import (
    NamexQwen2MoeDecoderLayer,
    NamexQwen2MoeForCausalLM,
    NamexQwen2MoeModel,
    NamexQwen2MoeSparseMoeBlock,
)

FORMS: dict[type, tuple[type, type, type, type, type, type]] = {
    Qwen2MoeForCausalLM: (
        NamexQwen2MoeConfig,
        NamexQwen2MoeForCausalLM,
        NamexQwen2MoeModel,
        NamexQwen2MoeDecoderLayer,
        Qwen2MoeSparseMoeBlock,
        NamexQwen2MoeSparseMoeBlock,
    ),
    DeepseekForCausalLM: (
        NamexDeepseekConfig,
        NamexDeepseekForCausalLM,
        NamexDeepseekModel,
        NamexDeepseekDecoderLayer,
        DeepseekMoeBlock,
        NamexDeepseekMoeBlock,
    ),
}


def patch_classes(model: Any) -> None:
    """Give every MoE block of `model` a base expert (not yet initialised) and its modules their patched classes.

    Raises:
        TypeError: the model is of none of the classes that have a patched form.
        ValueError: its router renormalises the top-k, so that no mass is left for a base expert.
    """
    if type(model) not in FORMS:
        accepted = ", ".join(known.__name__ for known in FORMS)
        raise TypeError(f"found a {type(model).__name__}; accepted: {accepted}")
    check_merge(None, model.config.norm_topk_prob)
    config, causal_lm, inner, layer_class, block, patched_block = FORMS[type(model)]
    model.config.__class__ = config  # one object, shared by all modules
    model.config.namex = None
    model.__class__, model.model.__class__ = causal_lm, inner
    for part in (model, model.model):
        # transformers looks up by the class's name what to record, and enters it only when a model is constructed;
        # without this router_logits would be missing and the auxiliary loss with it.
        _CAN_RECORD_REGISTRY[part] = part._can_record_outputs
    for layer in model.model.layers:
        layer.__class__ = layer_class
        mlp: Any = layer.mlp
        if type(layer.mlp) is block:
            mlp.__class__ = patched_block
            weight = mlp.gate.weight
            expert = Qwen2MoeMLP(model.config, intermediate_size=model.config.moe_intermediate_size)
            mlp.base_expert = expert.to(device=weight.device, dtype=weight.dtype).train(layer.training)


__all__ = ["patch_classes"]
