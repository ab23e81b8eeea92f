"""`patch_model`: the same merge in memory, on a live model, in place."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..calibration.sources import Texts
from ..checkpoint.rope import both_forms
from ..errors import FamilyError
from ..families import Family, family_of
from ..families.check import check_block
from ..families.outline import outline_of
from ..progress import FINISHED, ProgressCallback, ProgressEvent, no_progress
from ..recipe import Grouped, Recipe, Smaller
from .budget import spend
from .check import check_fit
from .config import patched_config, takes_grouped_products
from .gradients import gradients_of_live
from .model_sink import write_model
from .pipeline import Pipeline
from .result import LayerResult
from .sources import model_source
from .text import check_own, text_for
from .threads import shared_out


@torch.no_grad()
def patch_model(
    model: Any,
    recipe: Recipe | None = None,
    tokenizer: Any = None,
    *,
    texts: Texts | None = None,
    progress: ProgressCallback = no_progress,
) -> Any:
    """Patch a live transformers model in place and return it.

    Equal to the checkpoint path: bit for bit on the CPU at equal dtype, else to rounding.

    Args:
        model: a ``*ForCausalLM`` of a supported family.
        tokenizer: the model's, for a recipe that reads calibration text other than token ids.
        texts: calibration text, in the place of what the recipe names: a list of texts, or of chats, each a list of
            messages, which the tokenizer's chat template writes.
        progress: called after every layer, and after every stage of one that text is read for; ``done`` is layers.

    Memory: beyond the model one base expert a layer (where the recipe has one), or the merged experts of one layer
    (``grouped``), a head where the model has none of its own (`fit_for_others`), and with calibration text what
    `Pipeline` says.

    Raises:
        CalibrationError: no tokenizer was given, or the text cannot be had.
        FamilyError: the model is of no supported family.
        RecipeError: the recipe does not fit it, or goes without text where there are texts.
    """
    recipe = recipe or Recipe()
    config = model.config.to_dict()
    family = family_of(config)
    outline = outline_of(config)
    recipe = check_fit(recipe, outline)
    check_own(recipe, texts)
    if not {outline.embedding, outline.head} <= model.state_dict().keys():
        raise FamilyError(f"{type(model).__name__}: accepted: a causal language model of {family.model_type}")
    check_block(config, outline)
    text = counts = None
    if recipe.needs_text:
        text = text_for(recipe, config, tokenizer, texts)
        recipe = recipe.with_text(text.name)
    fit_for_others(model, family)
    source = model_source(model, outline, copies="align" in recipe.steps)
    count = LayerCount(progress, len(outline.shape.layers))
    if text is not None and isinstance(recipe.merge, Grouped) and recipe.merge.budget == "damage":
        counts = [layer["experts"] for layer in spend(source, recipe, text, count)]
    patched = patched_config(model.config.to_dict(), outline, recipe)
    gradients = gradients_of_live(model, outline, text, recipe)
    pipeline = Pipeline(source, recipe, patched, text, gradients=gradients, counts=counts, progress=count)
    with shared_out() if text is None else nullcontext():
        write_model(model, outline, recipe, count.layers(pipeline.run()))
    width = recipe.merge.width if isinstance(recipe.merge, Smaller) else None
    if width and not takes_grouped_products(width):
        model.set_experts_implementation("eager")
    model.config.namex = recipe.to_stored()
    return model


@dataclass
class LayerCount:
    """A callback that adds how many MoE layers of a live model are done."""

    progress: ProgressCallback
    total: int
    done: int = 0

    def __call__(self, event: ProgressEvent) -> None:
        self.progress(replace(event, done=self.done, total=self.total))

    def layers(self, results: Iterable[LayerResult]) -> Iterator[LayerResult]:
        """Every result; an event once its layer is written."""
        for result in results:
            layer = result.layer
            yield result
            del result  # before the next layer is read
            self.done += 1
            self(ProgressEvent(FINISHED, layer, amount=1))


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
