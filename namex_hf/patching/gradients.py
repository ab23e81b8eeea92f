"""``neurons: gradient``: how much the loss on the calibration text depends on each neuron."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..calibration.text import CalibrationText
from ..families.outline import Outline
from ..models.loading import without_bar
from ..recipe import Recipe
from .plan import Plan

Gradients = dict[int, torch.Tensor]


def gradients_of(plan: Plan) -> Gradients | None:
    """`neuron_gradients` of a plan's model, which is loaded as a whole; None where the recipe needs none."""
    if not plan.recipe.needs_gradients:
        return None
    assert plan.text is not None
    with without_bar():
        model = AutoModelForCausalLM.from_pretrained(plan.checkpoint.folder, dtype=torch.float32)
    return neuron_gradients(model, plan.outline, plan.text, plan.recipe.device)


def gradients_of_live(model: Any, outline: Outline, text: CalibrationText | None, recipe: Recipe) -> Gradients | None:
    """`neuron_gradients` of a copy of a model in float32; None where the recipe needs none."""
    if text is None or not recipe.needs_gradients:
        return None
    return neuron_gradients(copy.deepcopy(model).float(), outline, text, recipe.device)


def neuron_gradients(model: Any, outline: Outline, text: CalibrationText, device: str) -> Gradients:
    """Scores of all neurons by MoE layer, float32 ``[N, width]`` on the CPU.

    ``sum_s (sum_t z_t dL_s/dz_t)^2`` over sequences s and their tokens t, to first order the square of what the loss of
    a sequence changes by without the neuron (Molchanov et al. 2017). It is the sum over a column of ``D * dL_s/dD``.

    Args:
        model: in float32; its parameters lose their gradients.

    Memory: the model, the gradients of its down matrices, and the activations of one sequence.
    """
    blocks = {layer: model.get_submodule(outline.blocks[layer]) for layer in outline.shape.layers}
    model.to(device).eval().requires_grad_(False)
    downs = {layer: block.experts.down_proj.requires_grad_(True) for layer, block in blocks.items()}
    scores = {layer: torch.zeros(down.shape[0], down.shape[2], device=device) for layer, down in downs.items()}
    model.config.output_router_logits = False  # else the balance loss is in the loss
    for ids in text.ids.to(device).split(1):
        with torch.enable_grad():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        gradients = torch.autograd.grad(loss, list(downs.values()))
        for (layer, down), gradient in zip(downs.items(), gradients, strict=True):
            scores[layer] += (gradient * down.detach()).sum(1).square()
    return {layer: score.cpu() for layer, score in scores.items()}
