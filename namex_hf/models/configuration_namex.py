"""Configurations of the patched models: the family's own fields, and the recipe under ``namex``."""

import math
from typing import Any, ClassVar, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig

from .configuration_deepseek import DeepseekConfig

SPANS = ("token", "all", "previous", "prompt")
CURVATURES = {"identity": None, "calibrated": 4, "kronecker": 1}
"""Curvatures of ``merge: soft``, with their default `rank`."""
ROUTINGS = ("linear", "cosine", "stable")
METHODS = ("namex-full", "namex", "ep-camex", "camex", "smear", "smoe")
FIRST_LAYERS = ("merged", "sparse")
"""Form of the first MoE layer."""


class SoftChoice(NamedTuple):
    """The fields of the recipe that ``merge: soft`` reads."""

    eta: float
    """Step of the merge."""
    segment: int | None
    """Tokens that share a merged expert; None: every token has its own."""
    top_k: int | None
    """Experts per token in a merge; None: the model's own number, or all experts without a base expert."""
    span: str
    """The tokens whose routing determines a merged expert: one of `SPANS`."""
    renormalises: bool
    """Whether the top-k values are divided by their sum."""
    has_base: bool
    """Whether the experts are merged around a base expert; SMEAR has none."""
    curvature: str
    """One of `CURVATURES`."""
    rank: int | None
    """Of the curvature: directions per expert under ``calibrated``, Kronecker products under ``kronecker``."""


def soft_choice(recipe: dict[str, Any] | None) -> SoftChoice | None:
    """The fields of a recipe with ``merge: soft``, defaults filled in; None for another merge."""
    if recipe is None or recipe.get("merge") != "soft":
        return None
    curvature = recipe.get("curvature") or "identity"
    default = CURVATURES.get(curvature)
    segment, has_base = recipe.get("segment"), recipe.get("method") != "smear"
    by_segment = segment is not None or curvature == "calibrated"
    span = recipe.get("routing_span") or ("all" if by_segment else "token")
    return SoftChoice(
        recipe.get("eta", 1.0),
        64 if segment is None and span != "token" else segment,
        recipe.get("top_k"),
        span,
        not has_base or recipe.get("renormalise", False),
        has_base,
        curvature,
        default if default is None or recipe.get("rank") is None else recipe["rank"],
    )


def stays_sparse(config: Any, layer: int) -> bool:
    """Whether a decoder layer of a patched model is the first MoE layer, and the recipe leaves it sparse."""
    if (config.namex or {}).get("first_layer") != "sparse":
        return False
    moe_layers = (
        index
        for index in range(config.num_hidden_layers)
        if index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0
    )
    return layer == next(moe_layers, None)


def soft_choice_at(config: Any, layer: int) -> SoftChoice | None:
    """`soft_choice` of a decoder layer; None also for a layer that stays sparse."""
    return None if stays_sparse(config, layer) else soft_choice(config.namex)


def routing_of(recipe: dict[str, Any] | None) -> str:
    """How tokens are routed to experts: one of `ROUTINGS`."""
    return (recipe or {}).get("routing", "linear")


def is_residual(recipe: dict[str, Any] | None) -> bool:
    """Whether a base expert gets the routing mass that the top-k experts leave over."""
    recipe = recipe or {}
    return recipe.get("merge", "residual") == "residual" and recipe.get("method") not in ("smear", "smoe")


def check_merge(recipe: dict[str, Any] | None, norm_topk_prob: bool, experts: int | None = None) -> None:
    """Refuse a recipe that the blocks cannot compute; None stands for ``merge: residual``.

    Raises:
        ValueError: an unknown merge, method or routing; ``smear`` with a merge that needs a base expert; ``smoe`` with
            a merge of experts; a router that renormalises its top-k under ``residual``; or a field of ``soft`` out of
            range (`experts` is the upper bound of its ``top_k``).
    """
    recipe = recipe or {}
    merge, method = recipe.get("merge", "residual"), recipe.get("method", METHODS[0])
    if method not in METHODS:
        raise ValueError(f"namex.method is {method!r}; this model class computes {', '.join(METHODS)}")
    if merge != "soft" and method == "smear":
        raise ValueError(
            f"namex.method is 'smear', which has no base expert and merges all experts by the input, and namex.merge "
            f"{merge!r}; accepted with it is namex.merge: 'soft'"
        )
    if merge not in ("residual", "narrow") and method == "smoe":
        raise ValueError(
            f"namex.method is 'smoe', which merges nothing, and namex.merge {merge!r}; accepted: 'residual', 'narrow'"
        )
    if routing_of(recipe) not in ROUTINGS:
        raise ValueError(f"namex.routing is {routing_of(recipe)!r}; accepted: {', '.join(ROUTINGS)}")
    if recipe.get("first_layer", FIRST_LAYERS[0]) not in FIRST_LAYERS:
        raise ValueError(f"namex.first_layer is {recipe['first_layer']!r}; accepted: {', '.join(FIRST_LAYERS)}")
    if is_residual(recipe) and norm_topk_prob:
        raise ValueError(
            "norm_topk_prob is true: the top-k weights then sum to 1 and leave no mass for the base expert of "
            "'merge: residual'; accepted is norm_topk_prob: false"
        )
    choice = soft_choice(recipe)
    if choice is not None:
        _check_soft(choice, experts)
    elif merge not in ("residual", "grouped", "narrow"):
        raise ValueError(f"namex.merge is {merge!r}; accepted: 'residual', 'soft', 'grouped', 'narrow'")


def check_layer_experts(counts: list[int] | None, layers: int, experts: int) -> None:
    """Check the numbers of experts by layer; None means `experts` in every layer.

    Raises:
        ValueError: `counts` does not have a whole number from 0 to `experts` for each of the layers.
    """
    if counts is not None and (len(counts) != layers or not all(0 <= count <= experts for count in counts)):
        raise ValueError(f"layer_experts is {counts}; accepted: of each of {layers} layers 0 (no mixture) to {experts}")


def whole(value: Any) -> bool:
    """Whether `value` is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_span(choice: SoftChoice) -> None:
    if choice.span not in SPANS:
        raise ValueError(f"namex.routing_span is {choice.span!r}; accepted: {', '.join(SPANS)}")
    if choice.renormalises not in (True, False):
        raise ValueError(f"namex.renormalise is {choice.renormalises!r}; accepted: true, false")
    if choice.span == "token" and choice.curvature == "calibrated":
        raise ValueError(
            "namex.routing_span is 'token'; accepted with a calibrated curvature, which is no linear function of the "
            f"router's values: {', '.join(SPANS[1:])}"
        )
    if choice.span == "token" and choice.segment is not None:
        raise ValueError(f"namex.segment is {choice.segment!r}; accepted with namex.routing_span 'token': none")
    if choice.span != "token" and not whole(choice.segment):
        raise ValueError(f"namex.segment is {choice.segment!r}; accepted: a whole number from 1")


def _check_soft(choice: SoftChoice, experts: int | None) -> None:
    if choice.curvature not in CURVATURES:
        raise ValueError(f"namex.curvature is {choice.curvature!r}; accepted: {', '.join(CURVATURES)}")
    is_number = isinstance(choice.eta, (int, float)) and not isinstance(choice.eta, bool)
    if not (is_number and math.isfinite(choice.eta)):
        raise ValueError(f"namex.eta is {choice.eta!r}; accepted: a finite number")
    if choice.eta != 1 and not choice.has_base:
        raise ValueError(
            f"namex.eta is {choice.eta!r}; namex.method 'smear' has no base expert to step from: accepted: 1"
        )
    if choice.rank is not None and not whole(choice.rank):
        raise ValueError(f"namex.rank is {choice.rank!r}; accepted: a whole number from 1")
    if choice.curvature == "calibrated" and not 0 < choice.eta <= 1:
        raise ValueError(
            f"namex.eta is {choice.eta!r}; accepted with a calibrated curvature: above 0 up to 1, so that no expert's "
            "share is negative"
        )
    _check_span(choice)
    if choice.top_k is not None and not (whole(choice.top_k) and choice.top_k <= (experts or choice.top_k)):
        raise ValueError(
            f"namex.top_k is {choice.top_k!r}; accepted: a whole number from 1 to {experts or 'all'} experts"
        )


@strict
class NamexQwen2MoeConfig(Qwen2MoeConfig):
    """A patched Qwen2-MoE; ``namex`` is its recipe.

    ``layer_experts``: routed experts of each decoder layer, where MoE layers differ; `num_experts` is then the largest.
    """

    model_type = "namex_qwen2_moe"
    remote_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_namex.NamexQwen2MoeConfig",
        "AutoModel": "modeling_namex_qwen2_moe.NamexQwen2MoeModel",
        "AutoModelForCausalLM": "modeling_namex_qwen2_moe.NamexQwen2MoeForCausalLM",
        "AutoModelForSequenceClassification": "modeling_namex_qwen2_moe.NamexQwen2MoeForSequenceClassification",
    }

    namex: dict | None = None
    layer_experts: list[int] | None = None

    def __post_init__(self, **kwargs):
        check_merge(self.namex, self.norm_topk_prob, self.num_experts)
        check_layer_experts(self.layer_experts, self.num_hidden_layers, self.num_experts)
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save, with the whole ``auto_map``: transformers alone would omit ``AutoModel``."""
        self.auto_map = dict(self.remote_classes)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


@strict
class NamexDeepseekConfig(DeepseekConfig):
    """A patched DeepSeek-MoE v1; ``namex`` is its recipe.

    ``layer_experts``: routed experts of each decoder layer, where MoE layers differ; `num_experts` is then the largest.
    """

    model_type = "namex_deepseek"
    remote_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_namex.NamexDeepseekConfig",
        "AutoModel": "modeling_namex_deepseek.NamexDeepseekModel",
        "AutoModelForCausalLM": "modeling_namex_deepseek.NamexDeepseekForCausalLM",
        "AutoModelForSequenceClassification": "modeling_namex_deepseek.NamexDeepseekForSequenceClassification",
    }

    namex: dict | None = None
    layer_experts: list[int] | None = None

    def __post_init__(self, **kwargs):
        check_merge(self.namex, self.renormalises, self.num_experts)
        check_layer_experts(self.layer_experts, self.num_hidden_layers, self.num_experts)
        super().__post_init__(**kwargs)


__all__ = ["NamexDeepseekConfig", "NamexQwen2MoeConfig"]
