"""Results of the pipeline into a live model, in place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..families.outline import Outline, build
from ..merging.alignment import reorder
from ..merging.experts import Expert, ExpertWeights
from ..models.convert import patch_classes
from ..recipe import Grouped, Merge, Recipe
from .blocks import block_name
from .config import smaller_fields
from .finite import require_finite_result
from .result import LayerResult, Tensors


def write_model(model: Any, outline: Outline, recipe: Recipe, results: Iterable[LayerResult]) -> None:
    """Give a model what the pipeline makes of its layers, and the class that the recipe asks for.

    Memory: beyond the model the added tensors of all layers, and the experts of one.
    """
    layers = outline.shape.layers
    blocks = {layer: model.get_submodule(outline.blocks[layer]) for layer in layers}
    added: dict[int, Tensors] = {}
    orders: dict[int, torch.Tensor] = {}
    counts = []
    for result in results:
        layer, added[result.layer] = result.layer, result.added
        if result.orders is not None:
            orders[layer] = result.orders
        if result.experts is not None and result.router is not None:
            counts.append(len(result.router))
            _replace(model, outline, result, _experts(result, counts[-1], recipe))
        for part, tensor in result.shared.items():
            _set(model, outline.shared(layer)[part], tensor)
        del result  # before the next layer is read
    if recipe.merge.rewrites:
        _count(model, outline, recipe.merge, counts)
    if recipe.own_class:
        patch_classes(model, recipe.to_stored())
    for layer, order in orders.items():
        fused, width = blocks[layer].experts, outline.shape.width
        gate_up, down = fused.gate_up_proj, fused.down_proj
        reorder(ExpertWeights(gate_up[:, :width], gate_up[:, width:], down), order.to(down.device))
    for layer, tensors in added.items():
        places = model.get_submodule(outline.blocks[layer]).state_dict(keep_vars=True)
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


def _replace(model: Any, outline: Outline, result: LayerResult, experts: Expert) -> None:
    """Give a block other experts, and a row of the router and an entry of its bias for each."""
    layer = result.layer
    assert experts.gate is not None
    assert result.router is not None
    _set(model, outline.fused(layer, "gate_up_proj"), torch.cat([experts.gate, experts.up], dim=1))
    _set(model, outline.fused(layer, "down_proj"), experts.down)
    _set(model, outline.router(layer), result.router)
    if (bias := outline.bias(layer)) and result.bias is not None:
        _set(model, bias, result.bias)


def _set(model: Any, name: str, value: torch.Tensor) -> None:
    """Give a parameter or a buffer another value, where the old one is; in place where that has its shape."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if old.shape == value.shape:
        old.copy_(value)
        return
    value = value.to(old.device)
    setattr(module, leaf, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)


def _count(model: Any, outline: Outline, merge: Merge, counts: list[int]) -> None:
    """Note what is left, in the configuration and in the modules; where layers differ, of each layer."""
    unequal = tuple(counts) if isinstance(merge, Grouped) and merge.budget == "damage" else None
    for name, value in smaller_fields(model.config.to_dict(), outline, merge, unequal).items():
        setattr(model.config, name, value)
    smaller = build(model.config.to_dict())
    for name, module in model.named_modules():
        for key, value in vars(smaller.get_submodule(name)).items():
            if isinstance(value, int | str) and key != "training":
                setattr(module, key, value)
    for layer, count in zip(outline.shape.layers, counts, strict=True):
        for module in model.get_submodule(outline.blocks[layer]).modules():
            for key in vars(module).keys() & {"num_experts", "top_k"}:
                setattr(module, key, min(getattr(module, key), count))
