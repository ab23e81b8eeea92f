"""Conversion of a model in memory to its patched class, in place and without a copy of its tensors."""

from typing import Any

from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeForCausalLM

from .configuration_namex import check_merge
from .modeling_deepseek import DeepseekForCausalLM
from .modeling_namex_deepseek import NamexDeepseekForCausalLM
from .modeling_namex_qwen2_moe import NamexQwen2MoeForCausalLM

FORMS: dict[type, Any] = {
    Qwen2MoeForCausalLM: NamexQwen2MoeForCausalLM,
    DeepseekForCausalLM: NamexDeepseekForCausalLM,
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
    patched = FORMS[type(model)]
    model.config.__class__ = patched.config_class  # one object, shared by all modules
    model.config.namex = namex
    model.__class__ = patched
    model.patch()
