"""`patch_model`: the same merge in memory, on a live model, in place."""

from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import FamilyError
from ..families import PROJECTIONS, Family, MoeShape, family_of
from ..merging.base import first_base
from ..merging.groups import merge_layer
from ..merging.propagation import Walk, propagate
from ..models.convert import patch_classes
from ..recipe import Recipe
from .grouped import combination_of
from .plan import check_fit
from .threads import shared_out
from .walk import propagation_of


@torch.no_grad()
def patch_model(model: Any, recipe: Recipe | None = None) -> Any:
    """Patch a live transformers model in place and return it.

    Equal to the checkpoint path: bit for bit on the CPU at equal dtype, else to rounding.

    Args:
        model: a ``*ForCausalLM`` of a supported family.

    Memory: beyond the model one base expert a layer (where the recipe has one), or the merged experts of one layer
    (``grouped``).

    Raises:
        FamilyError: the model is of no supported family.
        RecipeError: the recipe does not fit it.
    """
    recipe = recipe or Recipe()
    config = model.config.to_dict()
    family = family_of(config)
    shape = family.shape(config)
    check_fit(recipe, shape)
    if not hasattr(model, "model") or not hasattr(model, "lm_head"):
        raise FamilyError(f"{type(model).__name__}: accepted: a causal language model of {family.model_type}")
    with shared_out():
        if recipe.merge == "grouped":
            _group(model, family, shape, recipe)
        elif recipe.has_base:
            _add_bases(model, family, shape, recipe)
    model.config.namex = recipe.to_dict()
    return model


def _block(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mlp


def _experts(block: Any, width: int) -> dict[str, torch.Tensor]:
    """Views of the fused experts by projection, on the CPU, where the checkpoint path computes too."""
    gate_up, down = block.experts.gate_up_proj.detach().cpu(), block.experts.down_proj.detach().cpu()
    return {"gate_proj": gate_up[:, :width], "up_proj": gate_up[:, width:], "down_proj": down}


def _shared(block: Any, family: Family) -> dict[str, torch.Tensor]:
    shared = getattr(block, family.shared_name)
    return {name: getattr(shared, name).weight.detach().cpu() for name in PROJECTIONS}


def _add_bases(model: Any, family: Family, shape: MoeShape, recipe: Recipe) -> None:
    choice, bases, walk = propagation_of(recipe), {}, None
    for position, layer in enumerate(shape.layers):
        experts = _experts(_block(model, layer), shape.width)
        if walk is None:
            shared = partial(_shared, _block(model, layer), family)
            walk = Walk(first_base(recipe.base, experts, shared, shape.width))
        bases[layer] = {name: walk.base[name].to(experts[name].dtype) for name in PROJECTIONS}
        walk = propagate(experts, walk, choice, position).walk
    patch_classes(model, recipe.to_dict())
    for layer, stored in bases.items():
        expert = _block(model, layer).base_expert
        for name in PROJECTIONS:
            getattr(expert, name).weight.copy_(stored[name])


def _group(model: Any, family: Family, shape: MoeShape, recipe: Recipe) -> None:
    assert recipe.experts is not None
    top_k = min(shape.top_k, recipe.experts)
    for layer in shape.layers:
        block = _block(model, layer)
        norm = model.model.layers[layer].post_attention_layernorm.weight.detach().cpu()
        merged = merge_layer(
            _experts(block, shape.width),
            block.gate.weight.detach().cpu(),
            norm,
            recipe.experts,
            shape.top_k,
            shape.renormalises,
            combination_of(recipe),
            recipe.seed,
        )
        place = block.gate.weight.device
        experts = [merged.expert(index) for index in range(recipe.experts)]
        fused = [torch.cat([one["gate_proj"], one["up_proj"]]) for one in experts]
        block.experts.gate_up_proj = nn.Parameter(torch.stack(fused).to(place))
        block.experts.down_proj = nn.Parameter(torch.stack([one["down_proj"] for one in experts]).to(place))
        block.gate.weight = nn.Parameter(merged.router.to(place))
        block.experts.num_experts = block.gate.num_experts = recipe.experts
        block.gate.top_k = top_k
    setattr(model.config, family.experts_field, recipe.experts)
    model.config.num_experts_per_tok = model.num_experts_per_tok = top_k
    model.num_experts = recipe.experts
