"""Conversion of a model in memory to its patched class, in place and without a copy of its tensors."""

from typing import Any

from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeForCausalLM
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, install_output_capuring_hook

from .configuration_namex import check_merge, routing_of
from .modeling_deepseek import DeepseekForCausalLM
from .modeling_namex_deepseek import NamexDeepseekForCausalLM, NamexDeepseekModel
from .modeling_namex_qwen2_moe import NamexQwen2MoeForCausalLM, NamexQwen2MoeModel
from .routers import CosineRouter

FORMS: dict[type, tuple[Any, Any]] = {
    Qwen2MoeForCausalLM: (NamexQwen2MoeForCausalLM, NamexQwen2MoeModel),
    DeepseekForCausalLM: (NamexDeepseekForCausalLM, NamexDeepseekModel),
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
    check_merge(model.config, namex)
    causal_lm, body = FORMS[type(model)]
    model.config.__class__ = causal_lm.config_class  # one object, shared by all modules
    model.config.namex = namex
    model.__class__, model.model.__class__ = causal_lm, body
    for part in (model, model.model):
        # transformers registers the outputs to record only when it constructs a model. Without this entry
        # router_logits and the auxiliary loss would be missing.
        _CAN_RECORD_REGISTRY[part] = part._can_record_outputs
        part._no_split_modules = set(type(part)._no_split_modules)  # the constructor filled it with other class names
    model.model.patch()
    if routing_of(namex) == "cosine" and getattr(model.model, "_output_capturing_hooks_installed", False):
        for module in model.modules():
            if isinstance(module, CosineRouter):
                # transformers installs its hooks once, when it first records outputs.
                install_output_capuring_hook(module, "router_logits", 0)
