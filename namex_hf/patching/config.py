"""``config.json`` of a result."""

from typing import Any

from ..checkpoint.rope import both_forms
from ..families import LAYER_EXPERTS, Config, without_prediction
from ..families.outline import Outline
from ..recipe import Grouped, Merge, Recipe, Smaller

IMPLEMENTATION = "experts_implementation"
"""Field by which transformers chooses the products of experts."""
GROUPED_MULTIPLE = (
    8  # of widths: torch.nn.functional.grouped_mm takes rows of 16 bytes, which are 8 numbers of bfloat16
)


def patched_config(
    config: Config, outline: Outline, recipe: Recipe, counts: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """``config.json`` of the result, before code is added to it or it is written in another family's form.

    Args:
        counts: of experts that each MoE layer keeps; None: all keep the recipe's number.
    """
    family = outline.family
    result = {**both_forms(config), **without_prediction(config), "namex": recipe.to_stored()}
    if family.is_to_untie(config):
        result["tie_word_embeddings"] = False
    result |= smaller_fields(config, outline, recipe.merge, counts)
    if recipe.own_class:
        result["model_type"] = family.patched_type
    return result


def smaller_fields(
    config: Config, outline: Outline, merge: Merge, counts: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The fields that say that experts are fewer, or narrower. Args: as `patched_config`."""
    family, shape = outline.family, outline.shape
    experts = merge.experts if isinstance(merge, Grouped) else shape.experts
    fields: dict[str, Any] = {}
    if counts is not None:
        experts = max(counts)
        fields[LAYER_EXPERTS] = by_decoder_layer(counts, shape.layers, len(outline.decoder_layers))
    if experts < shape.experts:
        fields |= family.with_experts(config, experts)
    if isinstance(merge, Smaller) and merge.width is not None:
        fields |= family.with_width(config, merge.width, outline.padded_width(merge.width))
    return fields


def takes_grouped_products(width: int) -> bool:
    """Whether grouped products, the default of transformers, take experts of a width, in whatever dtype."""
    return width % GROUPED_MULTIPLE == 0


def by_decoder_layer(counts: tuple[int, ...], layers: tuple[int, ...], depth: int) -> list[int]:
    """Counts of the MoE layers as the configuration has them: of every decoder layer, 0 where there is no mixture."""
    of_layer = dict(zip(layers, counts, strict=True))
    return [of_layer.get(layer, 0) for layer in range(depth)]
