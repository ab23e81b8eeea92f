"""How large a model is, and how much of it a token passes through."""

from dataclasses import dataclass
from math import prod

from ..checkpoint.layout import outline_in, per_expert
from ..checkpoint.source import Checkpoint
from ..merging.experts import PROJECTIONS
from ..models.configuration_namex import SoftChoice, soft_choice


@dataclass(frozen=True)
class ModelSize:
    """Of a checkpoint, from its headers alone."""

    experts: int
    """Routed ones of a layer; the mean where layers differ."""
    bytes: int
    """Of all tensors."""
    active: int
    """Parameters that a token passes through."""


def size_of(checkpoint: Checkpoint, routed: bool = True) -> ModelSize:
    """Count a model, patched or not.

    Active are all parameters, embeddings included, but routed experts beyond a token's top-k. Under ``soft`` by segment
    a token passes through one merged expert a layer; base experts, which only the merge reads, do not count. Curvature
    does not count, nor do linear routers that another has replaced.

    Args:
        routed: False: as if routed experts and their routers were not there.

    Raises:
        FamilyError, CheckpointError: as of `outline_in` and `per_expert`.
    """
    outline = outline_in(checkpoint)
    shape, spans = outline.shape, per_expert(checkpoint, outline)
    recipe = checkpoint.config.get("namex") or {}
    choice = soft_choice(recipe)
    apart = set(outline.places)
    if not routed or recipe.get("routing", "linear") != "linear":  # another router has taken the linear one's place
        apart |= {outline.file(outline.router(layer)) for layer in shape.layers}
    if choice is not None:
        kinds = ("curvature",) if choice.segment is None else ("base_expert", "curvature")
        parts = tuple(f"{outline.blocks[layer]}.{kind}." for layer in shape.layers for kind in kinds)
        apart |= {name for name in spans if name.startswith(parts)}
    dense = sum(prod(span.shape) for name, span in spans.items() if name not in apart and span.dtype.is_floating_point)
    one = sum(prod(shape.of(projection)) for projection in PROJECTIONS)
    choices: dict[int, SoftChoice | None] = dict.fromkeys(shape.layers, choice)
    if recipe.get("first_layer") == "sparse":
        choices[shape.layers[0]] = None
    through = sum(_passed(choices[layer], shape.top_k, shape.experts_of(layer)) for layer in shape.layers) * one
    if not routed:
        return ModelSize(0, sum(span.size for name, span in spans.items() if name not in apart), dense)
    mean = sum(map(shape.experts_of, shape.layers)) // len(shape.layers)
    return ModelSize(mean, sum(span.size for span in spans.values()), dense + through)


def _passed(choice: SoftChoice | None, top_k: int, experts: int) -> int:
    """Routed experts of a layer, stored or merged, that a token passes through."""
    if choice is None:
        return min(top_k, experts)
    if choice.segment is not None:
        return 1
    return choice.top_k or (top_k if choice.has_base else experts)
