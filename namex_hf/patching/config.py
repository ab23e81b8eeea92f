"""``config.json`` of a result."""

from typing import Any

from ..checkpoint.rope import both_forms
from ..families import LAYER_EXPERTS, Config, Family, MoeShape, without_prediction
from ..recipe import Grouped, Recipe


def patched_config(
    config: Config, family: Family, shape: MoeShape, recipe: Recipe, counts: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """``config.json`` of the result, before code is added to it or it is written in another family's form.

    Args:
        counts: of experts that each MoE layer keeps; None: all keep the recipe's number.
    """
    result = {**both_forms(config), **without_prediction(config), "namex": recipe.to_stored()}
    if family.is_to_untie(config):
        result["tie_word_embeddings"] = False
    merge = recipe.merge
    experts = merge.experts if isinstance(merge, Grouped) else None
    if counts is not None:
        experts = max(counts)
    if experts is not None and experts < shape.experts:
        result |= family.with_experts(config, experts)
    if counts is not None:
        result[LAYER_EXPERTS] = by_decoder_layer(counts, shape.layers, config["num_hidden_layers"])
    if recipe.own_class:
        result["model_type"] = family.patched_type
    return result


def by_decoder_layer(counts: tuple[int, ...], layers: tuple[int, ...], depth: int) -> list[int]:
    """Counts of the MoE layers as the configuration has them: of every decoder layer, 0 where there is no mixture."""
    of_layer = dict(zip(layers, counts, strict=True))
    return [of_layer.get(layer, 0) for layer in range(depth)]
