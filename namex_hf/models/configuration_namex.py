"""Configurations of the patched models: the family's own fields, and the recipe under ``namex``."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig

from .configuration_deepseek import DeepseekConfig, remote_classes

MERGES = ("residual", "soft", "grouped", "narrow")
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


def check_merge(config: Any, recipe: dict[str, Any] | None) -> None:
    """Refuse a recipe that the blocks cannot compute; None stands for ``merge: residual``.

    Args:
        config: of the family, patched or not.

    Raises:
        ValueError: an unknown merge, method or routing; ``smear`` with a merge that needs a base expert; ``smoe`` with
            a merge of experts; a router that renormalises its top-k under ``residual``; or a field of ``soft`` out of
            range.
    """
    recipe = recipe or {}
    merge, method = recipe.get("merge", "residual"), recipe.get("method", METHODS[0])
    _require("merge", merge, merge in MERGES, f"; accepted: {str(MERGES)[1:-1]}")
    _one_of("method", method, METHODS)
    no_base = f", which has no base expert and merges all experts by the input, and namex.merge {merge!r}"
    _require(
        "method", method, merge == "soft" or method != "smear", f"{no_base}; accepted with it is namex.merge: 'soft'"
    )
    plain = f", which merges nothing, and namex.merge {merge!r}; accepted: 'residual', 'narrow'"
    _require("method", method, merge in ("residual", "narrow") or method != "smoe", plain)
    _one_of("routing", routing_of(recipe), ROUTINGS)
    _one_of("first_layer", recipe.get("first_layer", FIRST_LAYERS[0]), FIRST_LAYERS)
    if is_residual(recipe) and getattr(config, "renormalises", config.norm_topk_prob):
        raise ValueError(
            "norm_topk_prob is true: the top-k weights then sum to 1 and leave no mass for the base expert of "
            "'merge: residual'; accepted is norm_topk_prob: false"
        )
    if choice := soft_choice(recipe):
        _check_soft(choice, config.num_experts)


def _require(field: str, value: Any, holds: bool, accepted: str) -> None:
    if not holds:
        raise ValueError(f"namex.{field} is {value!r}{accepted}")


def _one_of(field: str, value: Any, values: Iterable[str]) -> None:
    _require(field, value, value in values, f"; accepted: {', '.join(values)}")


def _check_soft(choice: SoftChoice, experts: int) -> None:
    eta, span, segment, rank, top_k = choice.eta, choice.span, choice.segment, choice.rank, choice.top_k
    calibrated, from_one = choice.curvature == "calibrated", "; accepted: a whole number from 1"
    _one_of("curvature", choice.curvature, CURVATURES)
    is_number = isinstance(eta, (int, float)) and not isinstance(eta, bool)
    _require("eta", eta, is_number and math.isfinite(eta), "; accepted: a finite number")
    no_step = "; namex.method 'smear' has no base expert to step from: accepted: 1"
    _require("eta", eta, eta == 1 or choice.has_base, no_step)
    _require("rank", rank, rank is None or whole(rank), from_one)
    positive = "; accepted with a calibrated curvature: above 0 up to 1, so that no expert's share is negative"
    _require("eta", eta, 0 < eta <= 1 or not calibrated, positive)
    _one_of("routing_span", span, SPANS)
    _require("renormalise", choice.renormalises, choice.renormalises in (True, False), "; accepted: true, false")
    not_linear = "; accepted with a calibrated curvature, which is no linear function of the router's values: "
    _require("routing_span", span, span != "token" or not calibrated, not_linear + ", ".join(SPANS[1:]))
    if span == "token":
        _require("segment", segment, segment is None, "; accepted with namex.routing_span 'token': none")
    else:
        _require("segment", segment, whole(segment), from_one)
    few_enough = top_k is None or (whole(top_k) and top_k <= experts)
    _require("top_k", top_k, few_enough, f"{from_one} to {experts} experts")


def whole(value: Any) -> bool:
    """Whether `value` is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class PatchedFields:
    """Mixin for a patched model's configuration.

    ``namex`` is the recipe. ``layer_experts`` are the routed experts of each decoder layer, where MoE layers differ;
    `num_experts` is then the largest.
    """

    remote_classes: ClassVar[dict[str, str]]

    def __post_init__(self: Any, **kwargs):
        check_merge(self, self.namex)
        counts, layers = self.layer_experts, self.num_hidden_layers
        if counts is not None and (len(counts) != layers or not all(0 <= one <= self.num_experts for one in counts)):
            accepted = f"of each of {layers} layers 0 (no mixture) to {self.num_experts}"
            raise ValueError(f"layer_experts is {counts}; accepted: {accepted}")
        super().__post_init__(**kwargs)

    def save_pretrained(self, *args, **kwargs):
        """Save, with the whole ``auto_map``: transformers alone would omit ``AutoModel``."""
        self.auto_map = dict(self.remote_classes)
        super().save_pretrained(*args, **kwargs)


@strict
class NamexQwen2MoeConfig(PatchedFields, Qwen2MoeConfig):
    """A patched Qwen2-MoE."""

    model_type = "namex_qwen2_moe"
    remote_classes = remote_classes("configuration_namex", "modeling_namex_qwen2_moe", "NamexQwen2Moe")

    namex: dict | None = None
    layer_experts: list[int] | None = None


@strict
class NamexDeepseekConfig(PatchedFields, DeepseekConfig):
    """A patched DeepSeek-MoE v1."""

    model_type = "namex_deepseek"
    remote_classes = remote_classes("configuration_namex", "modeling_namex_deepseek", "NamexDeepseek")

    namex: dict | None = None
    layer_experts: list[int] | None = None
