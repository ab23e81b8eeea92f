"""The report of a patched model that another training loop has saved: the recipe is in its configuration, no more."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.bytes import Reader
from ..checkpoint.folder import list_files
from ..checkpoint.header import TensorSpan
from ..checkpoint.layout import outline_in, per_expert
from ..checkpoint.shard import write_index, write_tensors
from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import CheckpointError
from ..families.outline import Outline
from ..files import CARD, CONFIG, INDEX, RECIPE, REPORT, SINGLE, STATISTICS, locate, read_text, write_text
from ..merging.base import own_base
from ..merging.experts import Expert, ExpertWeights, NotFiniteError
from ..merging.propagation import PropagationState, propagate
from ..recipe import AroundBase, Recipe
from ..record import Report
from .card import card

UNKNOWN = dict.fromkeys(("name", "commit", "fingerprint", "bytes", "patched"))
"""Of the source: nothing that such a folder holds tells it."""


def has_recipe_alone(path: Path) -> bool:
    """Whether a patched model lies there without its report."""
    if locate(path, REPORT).exists() or not (path / CONFIG).is_file():
        return False
    return isinstance(open_checkpoint(path).config.get("namex"), dict)


def rebuild(path: Path) -> Report:
    """Write report, statistics and recipe, and card and index where they are missing; returns the report.

    The games are played around the base experts as they are, as they are after training by `namex_hf` itself. What only
    the training loop knew (source, data, steps) is null.

    Memory: one layer's experts in their own dtype, its base, and chunks in float32.

    Raises:
        CheckpointError, FamilyError, RecipeError: the folder is damaged.
        OSError: it cannot be written to.
    """
    checkpoint = open_checkpoint(path)
    recipe = Recipe.from_stored(checkpoint.config["namex"])
    layers: list[dict[str, Any]] = []
    cosines: dict[str, torch.Tensor] = {}
    if isinstance(recipe.merge, AroundBase) and recipe.merge.has_base:
        layers, cosines = _layers(checkpoint, recipe.merge)
    report = Report(
        run={"recipe": recipe.to_dict(), "rebuilt": True},
        source=UNKNOWN,
        family=str(checkpoint.config.get("model_type")),
        layers=layers,
        totals={"seconds": None, "bytes_out": checkpoint.size},
    )
    if (path / SINGLE).is_file() and not (path / INDEX).exists():
        write_index(path, dict.fromkeys(checkpoint.spans, SINGLE), checkpoint.size)
    if cosines:
        write_tensors(path / STATISTICS, cosines)
    write_text(path / RECIPE, recipe.to_yaml(stored=True))
    if not (path / CARD).exists():
        write_text(path / CARD, card(report, checkpoint.config, path))
    own = {CONFIG, INDEX, RECIPE, STATISTICS, *(shard.name for shard in checkpoint.shards)}
    listed = list_files(path, read_text(path / CONFIG), {})
    report = replace(report, files={name: one for name, one in listed.items() if name in own})
    write_text(path / REPORT, report.to_json())
    return report


@torch.no_grad()
def _layers(checkpoint: Checkpoint, merge: AroundBase) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Records of the MoE layers as a report has them, and what `STATISTICS` holds."""
    outline = outline_in(checkpoint)
    shape, spans = outline.shape, per_expert(checkpoint, outline)
    layers, cosines = [], {}
    with Reader() as reader:
        for position, layer in enumerate(shape.layers):
            experts = layer_experts(reader, spans, outline, layer)
            if merge.stays_sparse(layer, shape.layers):
                shared = partial(shared_expert, reader, spans, outline, layer)
                base = own_base(merge.base, experts, shared, shape.width)
            else:
                base = base_expert(reader, spans, outline, layer)
            try:
                step = propagate(experts, PropagationState(base), merge, position)
            except NotFiniteError as error:
                raise CheckpointError(f"{checkpoint.name}: layer {layer}, {error}") from error
            layers.append({"layer": layer, "games": step.record, "drift": None, "seconds": None})
            cosines[f"layers.{layer}.cosines"] = step.cosines.contiguous()
            del experts, base, step  # before the next layer is read
    return layers, cosines


def layer_experts(reader: Reader, spans: dict[str, TensorSpan], outline: Outline, layer: int) -> Expert:
    """The routed experts of a layer, stacked, in their own dtype."""
    count = outline.shape.experts_of(layer)
    return ExpertWeights.of(
        lambda name: torch.stack([reader.read(spans[outline.expert(layer, e, name)]) for e in range(count)])
    )


def base_expert(reader: Reader, spans: dict[str, TensorSpan], outline: Outline, layer: int) -> Expert:
    """The base expert of a layer, in float32."""
    return ExpertWeights.of(lambda name: reader.read(spans[outline.added(layer, "base", name)]).float())


def shared_expert(reader: Reader, spans: dict[str, TensorSpan], outline: Outline, layer: int) -> Expert:
    """The shared expert of a layer."""
    return ExpertWeights.of(lambda name: reader.read(spans[outline.file(outline.shared(layer)[name])]))
