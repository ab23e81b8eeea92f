"""What a MoE block has more than before, the base expert and measured curvature aside: routers in another form, and
curvature that is still to be trained."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint.rope import both_forms
from ..families import LAYER_EXPERTS, Config, Family, MoeShape
from ..merging.moe_layer import Text
from ..merging.routers import assignment, cosine_form, cosines, scale_by_entropy, scale_by_norms
from ..merging.routing import TokenRouting, route
from ..models.soft_kronecker import KroneckerCurvature, kronecker_parameters
from ..recipe import Grouped, Recipe, Soft
from ..recipe.parts import Curvature

KINDS = ("base", "curvature", "cosine_router", "stable_router")
"""How names of added tensors begin, before the part that they are."""


def patched_config(
    config: Config, family: Family, shape: MoeShape, recipe: Recipe, counts: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """``config.json`` of the result, before code is added to it or it is written in another family's form.

    Args:
        counts: of experts that each MoE layer keeps; None: all keep the recipe's number.
    """
    result = {**both_forms(config), "namex": recipe.to_stored()}
    if family.is_to_untie(config):
        result["tie_word_embeddings"] = False
    merge = recipe.merge
    kept = merge.experts if isinstance(merge, Grouped) else None
    if counts is not None:
        kept = max(counts)
    if kept is not None:
        result[family.experts_field] = kept
        result["num_experts_per_tok"] = min(shape.top_k, kept)
    if counts is not None:
        result[LAYER_EXPERTS] = by_decoder_layer(counts, shape.layers, config["num_hidden_layers"])
    if recipe.own_class:
        result["model_type"] = family.patched_type
    return result


def by_decoder_layer(counts: tuple[int, ...], layers: tuple[int, ...], depth: int) -> list[int]:
    """Counts of the MoE layers as the configuration has them: of every decoder layer, 0 where there is no mixture."""
    of_layer = dict(zip(layers, counts, strict=True))
    return [of_layer.get(layer, 0) for layer in range(depth)]


def router_tensors(
    recipe: Recipe,
    router: torch.Tensor,
    norm: torch.Tensor,
    config: Config,
    text: Text | None = None,
    ids: torch.Tensor | None = None,
    sparse: bool = False,
) -> dict[str, torch.Tensor]:
    """A router in the form that the recipe asks for, by the names of its parts in the block; none where it is linear.

    Args:
        router: ``[experts, hidden]``, the linear one of the patched layer.
        norm: ``[hidden]``, of the norm before it.
        config: of the patched model.
        text: as the layer hears it; None: no text is read.
        ids: of its tokens, ``[sequences, length]``.
        sparse: whether the layer keeps its sparse block.

    Memory: float32 ``[tokens, experts]`` a few times.
    """
    if recipe.routing.kind == "cosine":
        projection, embeddings = cosine_form(router)
        if recipe.routing.temperature == "norms":
            scale = scale_by_norms(router, norm)
        else:
            assert text is not None
            logits = text.inputs @ router.to(text.inputs).T
            scale = scale_by_entropy(logits, cosines(text.inputs, projection, embeddings))
        parts = {"projection": projection, "embeddings": embeddings, "scale": torch.tensor([scale])}
        return {f"cosine_router.{name}": tensor.to(router.dtype) for name, tensor in parts.items()}
    if recipe.routing.kind == "stable":
        assert text is not None
        assert ids is not None
        routing = route(text.inputs, router.to(text.inputs), assigned_top_k(recipe, config, sparse), renormalises=False)
        ids = ids.to(routing.index.device)
        learnt = ~text.held_out.to(ids.device)
        tokens = learnt.repeat_interleave(ids.shape[1])
        learnt_routing = TokenRouting(routing.index[tokens], routing.value[tokens])
        table = assignment(ids[learnt].flatten(), learnt_routing, len(router), config["vocab_size"])
        return {"stable_router.assignment": table.cpu()}
    return {}


def assigned_top_k(recipe: Recipe, config: Config, sparse: bool) -> int:
    """How many experts ``routing: stable`` assigns to an id; in a layer that stays sparse the model's own number."""
    top_k = recipe.merge.top_k if isinstance(recipe.merge, Soft) else None
    return config["num_experts_per_tok"] if sparse or top_k is None else top_k


def ranked_curvature(recipe: Recipe) -> Curvature | None:
    """The curvature that a layer's block holds under ``soft``, measured or to be trained; None where it holds none."""
    merge = recipe.merge
    return merge.curvature if isinstance(merge, Soft) and merge.curvature.rank is not None else None


def kronecker_tensors(recipe: Recipe, shape: MoeShape, layer: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The start of a trainable curvature, by the names of its parts in the block; none where the layer has none."""
    curvature = ranked_curvature(recipe)
    if curvature is None or curvature.kind != "kronecker" or recipe.merge.stays_sparse(layer, shape.layers):
        return {}
    assert curvature.rank is not None
    trained = KroneckerCurvature(shape.experts, shape.hidden, shape.width, curvature.rank)
    trained.reset_parameters(torch.Generator().manual_seed((recipe.seed + layer) % (1 << 63)))
    return {f"curvature.{name}": tensor.to(dtype) for name, tensor in trained.state_dict().items()}


def router_bytes(recipe: Recipe, shape: MoeShape, kept: int, config: Config, dtype: torch.dtype, sparse: bool) -> int:
    """Bytes of a layer's `router_tensors`."""
    if recipe.routing.kind == "stable":
        return config["vocab_size"] * assigned_top_k(recipe, config, sparse) * torch.int32.itemsize
    return sum(map(math.prod, cosine_shapes(recipe, kept, shape.hidden).values())) * dtype.itemsize


def cosine_shapes(recipe: Recipe, kept: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's `router_tensors` under routing ``cosine``."""
    if recipe.routing.kind != "cosine":
        return {}
    rank = min(kept, hidden)
    shapes = {"projection": (rank, hidden), "embeddings": (kept, rank), "scale": (1,)}
    return {f"cosine_router.{name}": shape for name, shape in shapes.items()}


def curvature_bytes(recipe: Recipe, shape: MoeShape, dtype: torch.dtype) -> int:
    """Bytes of a layer's curvature under ``soft``, measured or to be trained."""
    curvature = ranked_curvature(recipe)
    if curvature is None:
        return 0
    assert curvature.rank is not None
    if curvature.kind == "kronecker":
        return shape.experts * kronecker_parameters(shape.hidden, shape.width, curvature.rank) * dtype.itemsize
    return shape.experts * (3 + curvature.rank * (shape.hidden + shape.width)) * dtype.itemsize


def by_block_name(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Added tensors by their names in the block."""
    return {block_name(name): tensor for name, tensor in tensors.items()}


def block_name(name: str) -> str:
    """Where in a block a tensor belongs that is called ``base.gate_proj``, ``curvature.usage`` ..."""
    kind, _, part = name.partition(".")
    return f"base_expert.{part}.weight" if kind == "base" else name
