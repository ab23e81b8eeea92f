"""Live propagation: the base expert is propagated through the layers in the forward pass (NAMEx eq. 7 and 9, 11).

A stored model has its own base expert in every layer, with its own gradient. A live model has only the base expert of
the first layer, and computes that of later layers,

    E_m^(l+1) = E_m^l + gamma sum_i alpha_i (E_i^l - E_m^l)

from the current experts of layer l. So gradients of later layers reach these experts and the first base. The weights
alpha are constants of the pass. `bargain.rebargain` solves for them again, by `bargain.BargainCallback` after every
n-th optimiser step. Under ``method: ep-camex`` with ``curvature: kronecker`` the step is
gamma/N sum_i M_i(E_i^l - E_m^l) (eq. 3), and gradients of later layers reach M_i too.
"""

from typing import Any

import torch

from ..errors import TrainingError
from ..families.outline import outline_of
from ..recipe import AroundBase, Recipe
from .bargain import LayerBargain, rebargain
from .gathered import gathered, write_base
from .live_blocks import BaseState, LiveBlock, live_form


def go_live(model: Any) -> Any:
    """Propagate the base expert of a patched model in every forward pass, in place; solves the games once.

    The first MoE layer's base is still a parameter. Those of later layers are frozen and not used. `rebargain` and
    every `state_dict` of the model overwrite them with the propagated bases, so a saved model is an ordinary patched
    folder with the same logits. Call this before the model is wrapped for FSDP2 or data parallel; before or after PEFT;
    after `choice.train_only`.

    With gamma = 1, weights on the simplex and no momentum the next base is sum alpha_i E_i, whatever the base was. The
    first base then acts in its own layer alone, with the gradient of a stored base.

    Args:
        model: a patched ``*ForCausalLM`` with propagation: ``merge: residual`` or ``soft``, method ``namex-full``,
            ``namex`` or ``ep-camex``; not ``first_layer: sparse``, which has no trainable first base.

    Memory: autograd stores a base expert for every MoE layer in the parameters' dtype. Gradient checkpointing stores
    the layers' arguments: a float32 base and the momentum buffers (one for a real beta, else two). The backward pass
    needs a matrix of all experts of a layer, beyond their gradient.

    Raises:
        TrainingError: the model has no propagation, is live or sharded already, or has experts that are not finite.
    """
    recipe = recipe_of(model)
    merge = check_first_base(recipe)
    blocks = moe_blocks(model)
    _check_layers(model, model.layer_class, "a patched layer, not live, not yet sharded")
    rebargain(model, recipe, write=False)  # raises its errors before the model is changed
    for block in blocks:
        block.__class__ = live_form(block.__class__)
        block.merge, block.last = merge, block is blocks[-1]
        block.trained = [parameter.requires_grad for parameter in block.base_expert.parameters()]
        if block is not blocks[0]:
            block.base_expert.requires_grad_(False)
    _swap_layers(model, live_form(model.layer_class))
    model.live_hook = model.register_state_dict_pre_hook(_before_state_dict)
    rebargain(model, recipe)
    return model


def refresh(model: Any) -> list[LayerBargain]:
    """Solve for the weights of a live model again, over its current experts: `rebargain` with its own recipe."""
    return rebargain(model, recipe_of(getattr(model, "get_base_model", lambda: model)()))


@torch.no_grad()
def write_bases(model: Any) -> None:
    """Overwrite the base of every layer of a live model with the propagated base, under the current weights.

    Args:
        model: sharded or not, on every process; without an adapter's wrapper.

    Memory: a whole decoder layer if it is sharded; the base and its momentum.
    """
    state: BaseState | None = None
    for layer in model.model.layers:
        block = layer.mlp
        if not isinstance(block, LiveBlock):
            continue
        with gathered(layer):
            current = block.first_state(next(block.base_expert.parameters())) if state is None else state
            following = block.next_state(current)
        if state is not None:
            write_base(block, current.base)
        state = following


def settle(model: Any) -> Any:
    """Convert a live model to a stored model, in place: the base of every layer becomes a parameter again.

    The logits are equal up to rounding of the bases to the parameters' dtype.

    Raises:
        TrainingError: the model is not live, or it is sharded (save it, and load the saved folder).
    """
    _check_layers(model, live_form(model.layer_class), "a live layer, not sharded")
    write_bases(model)
    model.live_hook.remove()
    del model.live_hook
    _swap_layers(model, model.layer_class)
    for block in moe_blocks(model):
        block.__class__ = type(block).stored
        for parameter, trains in zip(block.base_expert.parameters(), block.trained, strict=True):
            parameter.requires_grad_(trains)
        del block.merge, block.last, block.weights, block.trained
    return model


def recipe_of(model: Any) -> Recipe:
    """The recipe of a patched model.

    Raises:
        TrainingError: the model has no recipe, or a recipe without propagation.
    """
    stored = getattr(model.config, "namex", None)
    if not isinstance(stored, dict):
        raise TrainingError(f"{type(model).__name__} is not patched; accepted: a model with propagation of its base")
    recipe = Recipe.from_stored(stored)
    merge = recipe.merge
    if not merge.propagates:
        raise TrainingError(
            f"no base expert is propagated through the layers under merge '{merge.kind}', method '{merge.method}'; "
            "accepted: residual or soft, namex-full, namex or ep-camex"
        )
    return recipe


def check_first_base(recipe: Recipe) -> AroundBase:
    """The merge of a recipe whose first MoE layer has a base expert, with which live propagation begins.

    Raises:
        TrainingError: the recipe has ``first_layer: sparse``.
    """
    assert isinstance(recipe.merge, AroundBase)
    if recipe.merge.first_layer == "sparse":
        raise TrainingError(
            "recipe field 'first_layer' is 'sparse': a live base begins as a parameter of the first MoE layer; "
            "accepted: merged"
        )
    return recipe.merge


def moe_blocks(model: Any) -> list[Any]:
    """MoE blocks of a model, by layer."""
    return [model.get_submodule(path) for path in outline_of(model.config.to_dict()).blocks.values()]


def _check_layers(model: Any, kind: type, accepted: str) -> None:
    for layer in model.model.layers:
        if type(layer) is not kind:
            raise TrainingError(f"found a {type(layer).__name__}; accepted: {accepted}")


def _swap_layers(model: Any, kind: type) -> None:
    for layer in model.model.layers:
        layer.__class__ = kind
    for part in (model, model.model):  # wrappers find the modules to wrap by this name
        part._no_split_modules = {kind.__name__}


def _before_state_dict(model: Any, prefix: str, keep_vars: bool) -> None:
    if not any(parameter.is_meta for parameter in model.parameters()):  # accelerate calls it on the meta device too
        write_bases(model)
