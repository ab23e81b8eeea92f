"""Results of the pipeline into a live model, in place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..families import Family, MoeShape
from ..merging.alignment import reorder
from ..merging.experts import Expert, ExpertWeights
from ..models.convert import patch_classes
from ..recipe import Grouped, Recipe
from .blocks import block_name
from .config import by_decoder_layer
from .finite import require_finite_result
from .result import LayerResult, Tensors


def write_model(model: Any, family: Family, shape: MoeShape, recipe: Recipe, results: Iterable[LayerResult]) -> None:
    """Give a model what the pipeline makes of its layers, and the class that the recipe asks for.

    Memory: beyond the model the added tensors of all layers, and the experts of one.
    """
    blocks = {layer: model.get_submodule(family.block(layer)) for layer in shape.layers}
    added: dict[int, Tensors] = {}
    orders: dict[int, torch.Tensor] = {}
    for result in results:
        layer, added[result.layer] = result.layer, result.added
        if result.orders is not None:
            orders[layer] = result.orders
        if result.experts is not None and result.router is not None:
            _replace(blocks[layer], _experts(result, len(result.router), recipe), result.router)
        for part, tensor in result.shared.items():
            model.get_parameter(family.shared_parts(layer)[part]).copy_(tensor)
        del result  # before the next layer is read
    if isinstance(recipe.merge, Grouped):
        _count(model, family, shape, recipe.merge, [len(block.gate.weight) for block in blocks.values()])
    if recipe.own_class:
        patch_classes(model, recipe.to_stored())
    for layer, order in orders.items():
        fused = model.get_submodule(family.block(layer)).experts
        gate_up, down = fused.gate_up_proj, fused.down_proj
        views = ExpertWeights(gate_up[:, : shape.width], gate_up[:, shape.width :], down)
        reorder(views, order.to(down.device))
    for layer, tensors in added.items():
        places = model.get_submodule(family.block(layer)).state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            places[block_name(name)].copy_(tensor)


def _experts(result: LayerResult, count: int, recipe: Recipe) -> Expert:
    """All experts of a result, stacked."""
    assert result.experts is not None
    if isinstance(result.experts, ExpertWeights):
        return result.experts.map(torch.as_tensor)
    experts = [result.experts.expert(number) for number in range(count)]
    for number, expert in enumerate(experts):
        require_finite_result(result.layer, {f"expert {number} {name}": one for name, one in expert.items()}, recipe)
    return ExpertWeights.of(lambda name: torch.stack([expert[name] for expert in experts]))


def _replace(block: Any, experts: Expert, router: torch.Tensor) -> None:
    """Give a block other experts, and a row of the router for each."""
    place, count = block.gate.weight.device, len(router)
    block.experts.gate_up_proj = nn.Parameter(torch.cat([experts["gate_proj"], experts.up], dim=1).to(place))
    block.experts.down_proj = nn.Parameter(experts.down.to(place))
    block.gate.weight = nn.Parameter(router.to(place))
    block.experts.num_experts = block.gate.num_experts = count
    block.gate.top_k = min(block.gate.top_k, count)


def _count(model: Any, family: Family, shape: MoeShape, merge: Grouped, counts: list[int]) -> None:
    """Note the number of experts that is left; where layers differ, of each."""
    count = max(counts)
    if merge.budget == "damage":
        model.config.layer_experts = by_decoder_layer(tuple(counts), shape.layers, len(model.model.layers))
    setattr(model.config, family.experts_field, count)
    model.config.num_experts_per_tok = model.num_experts_per_tok = min(shape.top_k, count)
    model.num_experts = count
