"""How far the base expert moves from layer to layer under each method, over the experts of one folder."""

import math
from dataclasses import replace

import torch

from ..checkpoint.bytes import Reader
from ..merging.base import own_base
from ..merging.propagation import PropagationState, propagate
from ..recipe import AroundBase, Propagation, Residual
from .folder import PatchedFolder


def methods(going: Propagation) -> dict[str, Residual]:
    """The paper's ways to move the base expert, at a recipe's gamma; with its own momentum where that is another."""
    plain = Propagation(gamma=going.gamma)
    choices = {
        "NAMEx-Full": Residual(propagation=plain),
        "NAMEx": Residual(method="namex", propagation=plain),
        "EP-CAMEx": Residual(method="ep-camex", propagation=plain),
        "NAMEx-Full, momentum 0.9": Residual(propagation=replace(plain, momentum="complex")),
        "NAMEx-Full, quaternion": Residual(propagation=replace(plain, momentum="quaternion")),
    }
    known = [one.propagation.complex_beta for one in choices.values()]
    if going.momentum != "none" and going.complex_beta not in known:
        own = replace(plain, momentum=going.momentum, beta=going.beta)
        choices[f"NAMEx-Full, momentum {going.beta}"] = Residual(propagation=own)
    return choices


@torch.no_grad()
def distances(folder: PatchedFolder) -> dict[str, list[float]]:
    """L2 distances between successive base experts, gate, up and down together, by method; L - 1 for L MoE layers.

    Empty where the recipe has no base expert, or one layer alone is a mixture. Every layer but the last is read once
    for all methods.

    Memory: one layer's experts in their own dtype, and of each method the base in float32 with its momentum.
    """
    layers, merge = folder.shape.layers, folder.recipe.merge
    if not (isinstance(merge, AroundBase) and merge.has_base) or len(layers) < 2:
        return {}
    states: dict[str, PropagationState] = {}
    lengths: dict[str, list[float]] = {}
    with Reader() as reader:
        for position, layer in enumerate(layers[:-1]):
            experts = folder.experts(reader, layer)
            if position == 0:
                base = own_base(merge.base, experts, lambda: folder.shared(reader, layers[0]), folder.shape.width)
            for name, choice in methods(merge.propagation).items():
                before = states.get(name) or PropagationState(base)
                after = propagate(experts, before, choice, position).state
                assert after is not None, "every method here moves its base"
                moved = sum(float((after.base[part] - before.base[part]).square().sum()) for part in before.base)
                lengths.setdefault(name, []).append(math.sqrt(moved))
                states[name] = after
    return lengths
