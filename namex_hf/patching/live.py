"""`patch_model`: the same merge in memory, on a live model, in place."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ..calibration.text import CalibrationText
from ..checkpoint.rope import both_forms
from ..errors import CalibrationError, FamilyError
from ..families import Family, MoeShape, family_of
from ..merging.base import own_base
from ..merging.experts import Expert, Experts, ExpertWeights
from ..merging.groups import merge_layer
from ..merging.propagation import PropagationState, propagate
from ..models.convert import patch_classes
from ..progress import no_progress
from ..recipe import AroundBase, Grouped, Recipe
from .added import block_name, by_decoder_layer, kronecker_tensors, patched_config, router_tensors
from .budget import spend
from .calibrated import shrink_layers
from .finite import require_finite_result
from .kept import keep_layers, reorder
from .layer import moe_layer
from .on_text import Source
from .plan import check_fit
from .text import text_for
from .threads import shared_out
from .walk import stored_base


@torch.no_grad()
def patch_model(model: Any, recipe: Recipe | None = None, calibration: Any = None) -> Any:
    """Patch a live transformers model in place and return it.

    Equal to the checkpoint path: bit for bit on the CPU at equal dtype, else to rounding.

    Args:
        model: a ``*ForCausalLM`` of a supported family.
        calibration: for a recipe that reads calibration text: the model's tokenizer.

    Memory: beyond the model one base expert a layer (where the recipe has one), or the merged experts of one layer
    (``grouped``), a head where the model has none of its own (`fit_for_others`), and with calibration text what
    `calibrated.shrink_layers` says.

    Raises:
        CalibrationError: no tokenizer was given, or the text cannot be had.
        FamilyError: the model is of no supported family.
        RecipeError: the recipe does not fit it.
    """
    recipe = recipe or Recipe()
    config = model.config.to_dict()
    family = family_of(config)
    shape = family.shape(config)
    recipe = check_fit(recipe, shape)
    if not hasattr(model, "model") or not hasattr(model, "lm_head"):
        raise FamilyError(f"{type(model).__name__}: accepted: a causal language model of {family.model_type}")
    fit_for_others(model, family)
    if not recipe.needs_text:
        with shared_out():
            (_group if isinstance(recipe.merge, Grouped) else _keep)(model, family, shape, recipe)
        model.config.namex = recipe.to_stored()
        return model
    if calibration is None:
        raise CalibrationError("this recipe reads calibration text: patch_model needs calibration=tokenizer")
    text = text_for(recipe, config, calibration)
    recipe = recipe.with_text(text.name)
    (_group_on_text if isinstance(recipe.merge, Grouped) else _keep_on_text)(model, family, shape, recipe, text)
    model.config.namex = recipe.to_stored()
    return model


def fit_for_others(model: Any, family: Family) -> None:
    """Give a live model what other programs look for in the folder that it will be saved to, in place.

    That is a head of its own, where the family asks for one and the model has its embedding for it; and the rotary
    embedding in both forms.

    Memory: a head where there was none.
    """
    if family.is_to_untie(model.config.to_dict()):
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        if model.lm_head.weight is model.model.embed_tokens.weight:
            weight = model.lm_head.weight
            model.lm_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    # Past the setter of transformers, which takes `rope_scaling` for another name of `rope_parameters`.
    vars(model.config).update(both_forms(model.config.to_dict()))


def _block(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mlp


def _experts(block: Any, width: int) -> Expert:
    """Views of the fused experts, on the CPU, where the checkpoint path computes too."""
    gate_up, down = block.experts.gate_up_proj.detach().cpu(), block.experts.down_proj.detach().cpu()
    return ExpertWeights(gate_up[:, :width], gate_up[:, width:], down)


def _norm(model: Any, layer: int) -> torch.Tensor:
    return model.model.layers[layer].post_attention_layernorm.weight.detach().cpu()


def _shared(block: Any, family: Family) -> Expert:
    shared = getattr(block, family.shared_name)
    return ExpertWeights.of(lambda name: getattr(shared, name).weight.detach().cpu())


def _keep(model: Any, family: Family, shape: MoeShape, recipe: Recipe) -> None:
    """Recipes that keep the experts, without text."""
    patched = patched_config(model.config.to_dict(), family, shape, recipe)
    merge, added, walk = recipe.merge, {}, None
    for position, layer in enumerate(shape.layers):
        block = _block(model, layer)
        experts = _experts(block, shape.width)
        added[layer] = kronecker_tensors(recipe, shape, layer, experts.dtype)
        added[layer] |= router_tensors(recipe, block.gate.weight.detach().cpu(), _norm(model, layer), patched)
        if isinstance(merge, AroundBase) and merge.has_base:
            if walk is None:
                walk = PropagationState(own_base(merge.base, experts, partial(_shared, block, family), shape.width))
            else:
                require_finite_result(layer, stored_base(walk, experts.dtype), recipe)
            if not merge.stays_sparse(layer, shape.layers):
                added[layer] |= stored_base(walk, experts.dtype)
            walk = propagate(experts, walk, merge, position, device=recipe.device).state
        require_finite_result(layer, added[layer], recipe)
    if recipe.own_class:
        patch_classes(model, recipe.to_stored())
        for layer, tensors in added.items():
            _fill(_block(model, layer), tensors)


def _group(model: Any, family: Family, shape: MoeShape, recipe: Recipe) -> None:
    """Merge without text."""
    merge = recipe.merge
    assert isinstance(merge, Grouped)
    config = model.config.to_dict()
    patched, added = patched_config(config, family, shape, recipe), {}
    for layer in shape.layers:
        block, norm = _block(model, layer), _norm(model, layer)
        before = moe_layer(config, shape, _experts(block, shape.width), block.gate.weight.detach().cpu())
        merged = merge_layer(before, norm, merge, recipe.seed, recipe.device)
        experts = [merged.expert(index) for index in range(merge.experts)]
        for index, one in enumerate(experts):
            require_finite_result(layer, {f"expert {index} {name}": matrix for name, matrix in one.items()}, recipe)
        _replace(block, _stacked(experts), merged.router)
        added[layer] = router_tensors(recipe, merged.router, norm, patched)
    _finish_grouped(model, family, shape, recipe, added)


def _group_on_text(model: Any, family: Family, shape: MoeShape, recipe: Recipe, text: CalibrationText) -> None:
    """Merge groups on calibration text."""
    patched, added = patched_config(model.config.to_dict(), family, shape, recipe), {}
    source = _source(model, family, shape, lambda layer: _experts(_block(model, layer), shape.width))
    counts = None
    if isinstance(recipe.merge, Grouped) and recipe.merge.budget == "damage":
        counts = tuple(layer["experts"] for layer in spend(source, recipe, text, no_progress))
    for made in shrink_layers(source, patched, recipe, text, None, no_progress, counts):
        _replace(_block(model, made.layer), made.mixture.experts, made.mixture.router)
        for part, tensor in made.shared.items():
            model.get_parameter(family.shared_parts(made.layer)[part]).copy_(tensor)
        added[made.layer] = made.routers
    _finish_grouped(model, family, shape, recipe, added)


def _finish_grouped(
    model: Any, family: Family, shape: MoeShape, recipe: Recipe, added: Mapping[int, dict[str, torch.Tensor]]
) -> None:
    """Note the number of experts that is left; where routing is not linear, or layers differ, a stock class does not
    do."""
    counts = [len(_block(model, layer).gate.weight) for layer in shape.layers]
    count = max(counts)
    if isinstance(recipe.merge, Grouped) and recipe.merge.budget == "damage":
        depth = len(model.model.layers)
        model.config.layer_experts = by_decoder_layer(tuple(counts), shape.layers, depth)
    setattr(model.config, family.experts_field, count)
    model.config.num_experts_per_tok = model.num_experts_per_tok = min(shape.top_k, count)
    model.num_experts = count
    if recipe.own_class:
        patch_classes(model, recipe.to_stored())
        for layer, tensors in added.items():
            _fill(_block(model, layer), tensors)


def _keep_on_text(model: Any, family: Family, shape: MoeShape, recipe: Recipe, text: CalibrationText) -> None:
    """Recipes that keep the experts, on calibration text."""
    patched = patched_config(model.config.to_dict(), family, shape, recipe)

    def experts(layer: int) -> Expert:
        return _experts(_block(model, layer), shape.width).map(torch.clone)

    source, made = _source(model, family, shape, experts), {}
    for one in keep_layers(source, patched, recipe, text, None, no_progress):
        made[one.layer] = one.orders, one.tensors
    patch_classes(model, recipe.to_stored())
    for layer, (orders, tensors) in made.items():
        fused, width = _block(model, layer).experts, shape.width
        gate, up, down = fused.gate_up_proj[:, :width], fused.gate_up_proj[:, width:], fused.down_proj
        reorder(ExpertWeights(gate, up, down), orders.to(down.device))
        _fill(_block(model, layer), tensors)


def _source(model: Any, family: Family, shape: MoeShape, experts: Callable[[int], Expert]) -> Source:
    """A live model to be read. A layer is read before it is replaced, and no layer above reads one below."""
    parameters = dict(model.named_parameters())

    def read(name: str) -> torch.Tensor:
        return parameters[name].detach().cpu()

    return Source(model.config.to_dict(), family, shape, read, experts, lambda layer: nullcontext())


def _fill(block: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Give a patched block what the original has not."""
    places = block.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        places[block_name(name)].copy_(tensor)


def _stacked(experts: list[Expert]) -> Expert:
    return ExpertWeights.of(lambda name: torch.stack([one[name] for one in experts]))


def _replace(block: Any, experts: Experts, router: torch.Tensor) -> None:
    """Give a block other experts, and a row of the router for each."""
    place, count = block.gate.weight.device, len(router)
    gate, up, down = map(torch.as_tensor, experts.values())
    block.experts.gate_up_proj = nn.Parameter(torch.cat([gate, up], dim=1).to(place))
    block.experts.down_proj = nn.Parameter(down.to(place))
    block.gate.weight = nn.Parameter(router.to(place))
    block.experts.num_experts = block.gate.num_experts = count
    block.gate.top_k = min(block.gate.top_k, count)
