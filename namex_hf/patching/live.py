"""`patch_model`: the same merge in memory, on a live model, in place."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..checkpoint.rope import both_forms
from ..errors import FamilyError
from ..families import Family, family_of
from ..families.check import check_block
from ..families.outline import outline_of
from ..progress import no_progress
from ..recipe import Grouped, Recipe
from .budget import spend
from .check import check_fit
from .config import patched_config
from .model_sink import write_model
from .pipeline import Pipeline
from .sources import model_source
from .text import text_for
from .threads import shared_out


@torch.no_grad()
def patch_model(model: Any, recipe: Recipe | None = None, calibration: Any = None) -> Any:
    """Patch a live transformers model in place and return it.

    Equal to the checkpoint path: bit for bit on the CPU at equal dtype, else to rounding.

    Args:
        model: a ``*ForCausalLM`` of a supported family.
        calibration: the model's tokenizer, for a recipe that reads calibration text other than token ids.

    Memory: beyond the model one base expert a layer (where the recipe has one), or the merged experts of one layer
    (``grouped``), a head where the model has none of its own (`fit_for_others`), and with calibration text what
    `Pipeline` says.

    Raises:
        CalibrationError: no tokenizer was given, or the text cannot be had.
        FamilyError: the model is of no supported family.
        RecipeError: the recipe does not fit it.
    """
    recipe = recipe or Recipe()
    config = model.config.to_dict()
    family = family_of(config)
    outline = outline_of(config)
    recipe = check_fit(recipe, outline)
    if not {outline.embedding, outline.head} <= model.state_dict().keys():
        raise FamilyError(f"{type(model).__name__}: accepted: a causal language model of {family.model_type}")
    check_block(config, outline)
    fit_for_others(model, family)
    text = counts = None
    if recipe.needs_text:
        text = text_for(recipe, config, calibration)
        recipe = recipe.with_text(text.name)
    source = model_source(model, outline, copies="align" in recipe.steps)
    if text is not None and isinstance(recipe.merge, Grouped) and recipe.merge.budget == "damage":
        counts = [layer["experts"] for layer in spend(source, recipe, text, no_progress)]
    patched = patched_config(model.config.to_dict(), outline, recipe)
    with shared_out() if text is None else nullcontext():
        write_model(model, outline, recipe, Pipeline(source, recipe, patched, text, counts=counts).run())
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
        head = model.get_output_embeddings()
        if head.weight is model.get_input_embeddings().weight:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    # Past the setter of transformers, which takes `rope_scaling` for another name of `rope_parameters`.
    vars(model.config).update(both_forms(model.config.to_dict()))
