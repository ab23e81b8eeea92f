"""Live propagation: the base expert walks through the layers inside the forward pass (NAMEx eq. 7 and 9, 11).

A stored model has a base expert of its own in every layer, each with its own gradient. A live one has the first layer's
alone, and what a later layer uses is

    E_m^(l+1) = E_m^l + gamma sum_i alpha_i (E_i^l - E_m^l)

worked out from layer l's experts as they are in this pass, so gradients of later layers reach these experts and the
first base. The weights alpha are constants of the pass; `bargain.rebargain`, and so `bargain.BargainCallback` after
every n-th optimiser step, solves for them again. Under ``method: ep-camex`` with ``curvature: kronecker`` the step is
gamma/N sum_i M_i(E_i^l - E_m^l) (eq. 3), and gradients of later layers reach M_i, too.
"""

from typing import Any

import torch

from ..errors import TrainingError
from ..families import original_family
from ..recipe import AroundBase, Recipe
from .bargain import Settled, rebargain
from .gathered import gathered, write_base
from .live_blocks import LIVE, LiveBlock, Passing

STORED = {live: stored for stored, live in LIVE.items()}


def go_live(model: Any) -> Any:
    """Let the base expert of a patched model walk in every forward pass, in place; solves the games once.

    The first MoE layer's base is a parameter as before. Those of later layers are frozen and not used: they hold the
    bases that the walk comes to, as of the last `rebargain` and of whenever the model's `state_dict` is taken, so what
    is saved is an ordinary patched folder and gives the same logits. Under FSDP2 and data parallel this comes before
    the model is wrapped; under PEFT before or after; with `choice.train_only` after it.

    With gamma = 1, weights on the simplex and no momentum the next base is sum alpha_i E_i whatever the base was: the
    first base then acts in its own layer alone, and its gradient is that of a stored base.

    Args:
        model: a patched ``*ForCausalLM`` whose base walks: ``merge: residual`` or ``soft``, method ``namex-full``,
            ``namex`` or ``ep-camex``; not ``first_layer: sparse``, which has no first base to be trained.

    Memory: autograd keeps one base expert a MoE layer in the parameters' dtype; under gradient checkpointing what a
    layer is called with, one in float32 and as many again as momentum has buffers (one for a real beta, else two). In
    the backward pass one matrix of all of a layer's experts, beside the gradient that they have anyway.

    Raises:
        TrainingError: another model, one that is live or sharded already, or experts that are not finite.
    """
    recipe = recipe_of(model)
    merge = check_first_base(recipe)
    blocks = mixtures(model)
    for layer in model.model.layers:
        if type(layer) not in LIVE:
            raise TrainingError(f"found a {type(layer).__name__}; accepted: a patched layer, not live, not yet sharded")
    rebargain(model, recipe, write=False)  # what it refuses is refused before anything is changed
    for block in blocks:
        block.__class__ = LIVE[type(block)]
        block.merge, block.last = merge, block is blocks[-1]
        block.trained = [parameter.requires_grad for parameter in block.base_expert.parameters()]
        if block is not blocks[0]:
            block.base_expert.requires_grad_(False)
    _swap_layers(model, LIVE)
    model.live_hook = model.register_state_dict_pre_hook(_before_state_dict)
    rebargain(model, recipe)
    return model


def refresh(model: Any) -> list[Settled]:
    """Solve for the weights of a live model again, over the experts as they are: `rebargain` with its own recipe."""
    return rebargain(model, recipe_of(getattr(model, "get_base_model", lambda: model)()))


@torch.no_grad()
def write_bases(model: Any) -> None:
    """Give every layer of a live model the base that the walk comes to, with the weights that are in force.

    Args:
        model: sharded or not, on every process; not under an adapter's wrapper.

    Memory: one decoder layer whole, where it is sharded; the base and its momentum.
    """
    passing: Passing | None = None
    for layer in model.model.layers:
        block = layer.mlp
        if not isinstance(block, LiveBlock):
            continue
        with gathered(layer):
            here = block.arrived(next(block.base_expert.parameters())) if passing is None else passing
            further = block.taken_on(here)
        if passing is not None:
            write_base(block, here.base)
        passing = further


def settle(model: Any) -> Any:
    """Make a live model a stored one, in place: every layer gets the base that it used, to be trained from now on.

    The logits stay, up to rounding of the bases to the parameters' dtype.

    Raises:
        TrainingError: the model is not live, or it is sharded (save it, and load what was saved).
    """
    for layer in model.model.layers:
        if type(layer) not in STORED:
            raise TrainingError(f"found a {type(layer).__name__}; accepted: a live layer, not sharded")
    write_bases(model)
    model.live_hook.remove()
    del model.live_hook
    _swap_layers(model, STORED)
    for block in mixtures(model):
        block.__class__ = STORED[type(block)]
        for parameter, trains in zip(block.base_expert.parameters(), block.trained, strict=True):
            parameter.requires_grad_(trains)
        del block.merge, block.last, block.weights, block.trained
    return model


def recipe_of(model: Any) -> Recipe:
    """The recipe that a model was patched with.

    Raises:
        TrainingError: it has none, or one under which no base walks.
    """
    found = getattr(model.config, "namex", None)
    if not isinstance(found, dict):
        raise TrainingError(f"{type(model).__name__} is not patched; accepted: a model whose base expert walks")
    recipe = Recipe.from_stored(found)
    merge = recipe.merge
    if not merge.propagates:
        raise TrainingError(
            f"no base expert walks through the layers under merge '{merge.kind}', method '{merge.method}'; "
            "accepted: residual or soft, namex-full, namex or ep-camex"
        )
    return recipe


def check_first_base(recipe: Recipe) -> AroundBase:
    """The merge of a recipe, refused where the first MoE layer has no base expert for a live walk to begin with.

    Raises:
        TrainingError: that is ``first_layer: sparse``.
    """
    assert isinstance(recipe.merge, AroundBase)
    if recipe.merge.first_layer == "sparse":
        raise TrainingError(
            "recipe field 'first_layer' is 'sparse': a live base begins as a parameter of the first MoE layer; "
            "accepted: merged"
        )
    return recipe.merge


def mixtures(model: Any) -> list[Any]:
    """MoE blocks of a model, by layer."""
    config = model.config.to_dict()
    return [model.model.layers[index].mlp for index in original_family(config).shape(config).layers]


def _swap_layers(model: Any, forms: dict[type, type]) -> None:
    names = {form.__name__: other.__name__ for form, other in forms.items()}
    for layer in model.model.layers:
        layer.__class__ = forms[type(layer)]
    for part in (model, model.model):  # by whose names wrappers find what to wrap
        part._no_split_modules = {names.get(name, name) for name in part._no_split_modules}


def _before_state_dict(model: Any, prefix: str, keep_vars: bool) -> None:
    if not any(parameter.is_meta for parameter in model.parameters()):  # accelerate takes one of a model on meta
        write_bases(model)
