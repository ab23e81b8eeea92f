"""How far the base expert moves from layer to layer under each method, over the experts of one folder."""

import math
from dataclasses import replace

import torch

from ..checkpoint.bytes import Reader
from ..merging.base import own_base
from ..merging.propagation import Propagation, Walk, propagate
from ..momentum import DEFAULTS, Momentum
from ..recipe import Recipe
from .folder import PatchedFolder


def methods(recipe: Recipe) -> dict[str, Propagation]:
    """The paper's ways to move the base expert, at the recipe's gamma; with its own momentum where that is another."""
    nash = Propagation(gamma=recipe.gamma)
    found = {
        "NAMEx-Full": nash,
        "NAMEx": replace(nash, every=None),
        "EP-CAMEx": replace(nash, weighting="uniform"),
        "NAMEx-Full, momentum 0.9": replace(nash, beta=Momentum("complex", DEFAULTS["complex"]).complex_beta),
        "NAMEx-Full, quaternion": replace(nash, beta=Momentum("quaternion", DEFAULTS["quaternion"]).complex_beta),
    }
    if recipe.momentum != "none" and recipe.complex_beta not in [one.beta for one in found.values()]:
        found[f"NAMEx-Full, momentum {recipe.beta}"] = replace(nash, beta=recipe.complex_beta)
    return found


@torch.no_grad()
def distances(folder: PatchedFolder) -> dict[str, list[float]]:
    """L2 distances between successive base experts, gate, up and down together, by method; L - 1 for L MoE layers.

    Empty where the recipe has no base expert, or one layer alone is a mixture. The methods walk side by side: every
    layer but the last is read once for all of them.

    Memory: one layer's experts in their own dtype, and of each method the base in float32 with its momentum.
    """
    layers, recipe = folder.shape.layers, folder.recipe
    if not recipe.has_base or len(layers) < 2:
        return {}
    walks: dict[str, Walk] = {}
    found: dict[str, list[float]] = {}
    with Reader() as reader:
        for position, layer in enumerate(layers[:-1]):
            experts = folder.experts(reader, layer)
            if position == 0:
                base = own_base(recipe.base, experts, lambda: folder.shared(reader, layers[0]), folder.shape.width)
            for name, choice in methods(recipe).items():
                before = walks.get(name) or Walk(base)
                after = propagate(experts, before, choice, position).walk
                assert after is not None, "every method here moves its base"
                moved = sum(float((after.base[part] - before.base[part]).square().sum()) for part in before.base)
                found.setdefault(name, []).append(math.sqrt(moved))
                walks[name] = after
    return found
