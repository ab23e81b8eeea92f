"""Conversion of a model in memory to its patched class, in place and without a copy of its tensors."""

from typing import Any

from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeForCausalLM,
    Qwen2MoeSparseMoeBlock,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, install_output_capuring_hook

from .configuration_namex import NamexDeepseekConfig, NamexQwen2MoeConfig, check_merge, soft_choice_at
from .modeling_deepseek import DeepseekForCausalLM, DeepseekMoeBlock
from .modeling_namex_deepseek import (
    NamexDeepseekDecoderLayer,
    NamexDeepseekForCausalLM,
    NamexDeepseekModel,
    NamexDeepseekMoeBlock,
    SoftDeepseekMoeBlock,
)
from .modeling_namex_qwen2_moe import (
    NamexQwen2MoeDecoderLayer,
    NamexQwen2MoeForCausalLM,
    NamexQwen2MoeModel,
    NamexQwen2MoeSparseMoeBlock,
    SoftQwen2MoeSparseMoeBlock,
)
from .soft import experts_class
from .sparse import set_expert_count

FORMS: dict[type, tuple[type, type, type, type, type, type, type]] = {
    Qwen2MoeForCausalLM: (
        NamexQwen2MoeConfig,
        NamexQwen2MoeForCausalLM,
        NamexQwen2MoeModel,
        NamexQwen2MoeDecoderLayer,
        Qwen2MoeSparseMoeBlock,
        NamexQwen2MoeSparseMoeBlock,
        SoftQwen2MoeSparseMoeBlock,
    ),
    DeepseekForCausalLM: (
        NamexDeepseekConfig,
        NamexDeepseekForCausalLM,
        NamexDeepseekModel,
        NamexDeepseekDecoderLayer,
        DeepseekMoeBlock,
        NamexDeepseekMoeBlock,
        SoftDeepseekMoeBlock,
    ),
}


def patch_classes(model: Any, namex: dict[str, Any] | None = None) -> None:
    """Give the modules of `model` their patched classes, and every MoE block its new parts, without values.

    Args:
        model: of a class in `FORMS`.
        namex: the recipe, which becomes ``model.config.namex``. Its `merge` determines the class of the blocks; the
            blocks read the other fields. None: ``residual``.

    Raises:
        TypeError: the class of the model has no patched form.
        ValueError: the recipe does not fit the model, such as ``residual`` with a router that renormalises the top-k.
    """
    if type(model) not in FORMS:
        accepted = ", ".join(form.__name__ for form in FORMS)
        raise TypeError(f"found a {type(model).__name__}; accepted: {accepted}")
    renormalises = getattr(model.config, "renormalises", model.config.norm_topk_prob)
    check_merge(namex, renormalises, model.config.num_experts)
    config, causal_lm, inner, layer_class, block, sparse_block, soft_block = FORMS[type(model)]
    model.config.__class__ = config  # one object, shared by all modules
    model.config.namex = namex
    model.__class__, model.model.__class__ = causal_lm, inner
    for part in (model, model.model):
        # transformers registers the outputs to record only when it constructs a model. Without this entry
        # router_logits and the auxiliary loss would be missing.
        _CAN_RECORD_REGISTRY[part] = part._can_record_outputs
        part._no_split_modules = set(type(part)._no_split_modules)  # the constructor filled it with other class names
    for layer in model.model.layers:
        layer.__class__ = layer_class
        mlp: Any = layer.mlp
        if type(layer.mlp) is block:
            index, weight, stock_parts = layer.self_attn.layer_idx, mlp.gate.weight, set(mlp.children())
            if soft := soft_choice_at(model.config, index):
                mlp.__class__, mlp.experts.__class__ = soft_block, experts_class(soft)
                mlp.add_parts(model.config)
            else:
                mlp.__class__ = sparse_block
                mlp.add_parts(model.config, index)
            set_expert_count(mlp, model.config, index)
            for part in set(mlp.children()) - stock_parts:
                part.to(device=weight.device, dtype=weight.dtype).train(layer.training)
            if mlp.routing == "cosine" and getattr(model.model, "_output_capturing_hooks_installed", False):
                # transformers installs its hooks once, when it first records outputs.
                install_output_capuring_hook(mlp.cosine_router, "router_logits", 0)


__all__ = ["patch_classes"]
