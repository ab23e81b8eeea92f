"""transformers classes: native DeepSeek-MoE v1, and the patched models with a stored base expert.

Importing registers three model types with the Auto classes (``deepseek``, ``namex_deepseek``, ``namex_qwen2_moe``)
and changes none of transformers' own types. A registered class takes precedence over a folder's remote code, also
under ``trust_remote_code=True``.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_deepseek import DeepseekConfig
from .configuration_namex import NamexDeepseekConfig, NamexQwen2MoeConfig
from .loading import load_patched
from .modeling_deepseek import DeepseekForCausalLM, DeepseekForSequenceClassification, DeepseekModel
from .modeling_namex_deepseek import (
    NamexDeepseekForCausalLM,
    NamexDeepseekForSequenceClassification,
    NamexDeepseekModel,
)
from .modeling_namex_qwen2_moe import (
    NamexQwen2MoeForCausalLM,
    NamexQwen2MoeForSequenceClassification,
    NamexQwen2MoeModel,
)
from .sparse import left_over_mass


class RemoteCode(NamedTuple):
    """The code in a folder by which ``trust_remote_code=True`` opens it without this package."""

    auto_map: dict[str, str]
    """For ``config.json``."""
    files: tuple[Path, ...]
    """Files to copy next to ``config.json``, sorted by name; absolute paths into this package."""


CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "deepseek": (DeepseekConfig, DeepseekModel, DeepseekForCausalLM),
    "namex_deepseek": (NamexDeepseekConfig, NamexDeepseekModel, NamexDeepseekForCausalLM),
    "namex_qwen2_moe": (NamexQwen2MoeConfig, NamexQwen2MoeModel, NamexQwen2MoeForCausalLM),
}
"""Configuration, model and causal language model of every model type of this package."""

CLASSIFIERS: dict[str, Any] = {
    "deepseek": DeepseekForSequenceClassification,
    "namex_deepseek": NamexDeepseekForSequenceClassification,
    "namex_qwen2_moe": NamexQwen2MoeForSequenceClassification,
}
"""Sequence classifier, such as a reward model, of every model type of this package."""

PATCHED: dict[str, Any] = {"deepseek": NamexDeepseekConfig, "qwen2_moe": NamexQwen2MoeConfig}
"""From a family's model_type to the configuration class of its patched form, which has its own model_type."""


@cache
def remote_code(model_type: str) -> RemoteCode:
    """The files and the ``auto_map`` that a folder of `model_type` needs; empty for a type of transformers."""
    if model_type not in CLASSES:
        return RemoteCode({}, ())
    auto_map = dict(CLASSES[model_type][0].remote_classes)
    package = Path(__file__).resolve().parent
    roots = {package / f"{reference.split('.')[0]}.py" for reference in auto_map.values()}
    siblings = {Path(name).resolve() for root in roots for name in get_relative_import_files(root)}
    return RemoteCode(auto_map, tuple(sorted(roots | siblings)))


def _register() -> None:
    for model_type, (config, model, causal_lm) in CLASSES.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        config.register_for_auto_class()  # save_pretrained then copies the defining files and writes auto_map
        classifier = CLASSIFIERS[model_type]
        kinds = {AutoModel: model, AutoModelForCausalLM: causal_lm, AutoModelForSequenceClassification: classifier}
        for auto, kind in kinds.items():
            auto.register(config, kind, exist_ok=True)
            kind.register_for_auto_class(auto.__name__)


_register()

__all__ = [
    "CLASSES",
    "CLASSIFIERS",
    "PATCHED",
    "DeepseekConfig",
    "DeepseekForCausalLM",
    "DeepseekForSequenceClassification",
    "DeepseekModel",
    "NamexDeepseekConfig",
    "NamexDeepseekForCausalLM",
    "NamexDeepseekForSequenceClassification",
    "NamexDeepseekModel",
    "NamexQwen2MoeConfig",
    "NamexQwen2MoeForCausalLM",
    "NamexQwen2MoeForSequenceClassification",
    "NamexQwen2MoeModel",
    "RemoteCode",
    "left_over_mass",
    "load_patched",
    "remote_code",
]
