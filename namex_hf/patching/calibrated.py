"""``merge: grouped`` on calibration text: layer by layer, each on what the layers below it really produce."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from ..calibration.decoder import Decoder, Read, Tapped
from ..calibration.text import CalibrationText
from ..checkpoint.bytes import Reader
from ..checkpoint.header import TensorSpan, read_header
from ..checkpoint.shard import Item
from ..families import PROJECTIONS, Config, Family, MoeShape
from ..merging.calibrated import Choice, Mixture, Shrinking, Text
from ..merging.members import Tuning
from ..merging.routing import Routing
from ..recipe import Recipe
from .finite import check_finite
from .grouped import combination_of, write_packs
from .layer import named, read_experts
from .plan import Plan
from .state import State, Stream
from .walk import Advance


def choice_of(recipe: Recipe) -> Choice:
    """How a recipe makes a layer smaller, given text."""
    align, curvature, grouping, down = recipe.align, recipe.curvature, recipe.grouping, recipe.down
    assert recipe.experts and align and curvature and grouping and down, "a grouped recipe states them all"  # noqa: PT018
    tuning = Tuning(combination_of(recipe), align, curvature, recipe.metric, recipe.power, recipe.ridge)
    return Choice(recipe.experts, tuning, grouping, down, recipe.fit, recipe.fit_steps, recipe.seed)


@dataclass(frozen=True)
class Source:
    """A model to be read layer by layer, wherever it is."""

    config: Config
    family: Family
    shape: MoeShape
    read: Read
    experts: Callable[[int], dict[str, torch.Tensor]]  # of a MoE layer, stacked by projection
    named: Callable[[int], AbstractContextManager[None]]  # gives a complaint about an expert its tensor's name


@dataclass(frozen=True)
class Made:
    """A MoE layer that is finished."""

    layer: int
    mixture: Mixture
    cosines: torch.Tensor
    record: dict[str, Any]
    stream: Stream


def shrink_layers(
    source: Source, recipe: Recipe, text: CalibrationText, stream: Stream | None, tell: Callable[[int, str], None]
) -> Iterator[Made]:
    """Make the MoE layers smaller, one after the other.

    Args:
        stream: where to go on; None: at the bottom.
        tell: told of every finished stage of a layer.

    Memory: one decoder layer without its experts in float32, one layer's experts in their own dtype and again those
    that are left, and four times ``[tokens, hidden]`` in float32: the stream, the mixture's inputs, and outputs.
    """
    device = recipe.device
    decoder = Decoder(source.config, source.family, source.shape, source.read, device)
    if stream is None:
        stream = Stream(0, decoder.embed(text.ids).cpu())
    for layer in range(stream.layer, max(source.shape.layers) + 1):
        start = time.perf_counter()
        with decoder.layer(layer) as module:
            if not module.is_mixture:
                stream = Stream(layer + 1, module.forward(stream.hidden))
                continue
            tapped = module.tap(stream.hidden)
        tell(layer, "read")
        stream = Stream(layer + 1, tapped.rest)
        yield _shrink_layer(source, recipe, layer, tapped, text.held_out, partial(tell, layer), start)
        del tapped  # before the next layer is read


def _shrink_layer(
    source: Source,
    recipe: Recipe,
    layer: int,
    tapped: Tapped,
    held_out: torch.Tensor,
    tell: Callable[[str], None],
    start: float,
) -> Made:
    shape, device = source.shape, recipe.device
    inputs = tapped.inputs.to(device)
    routing = Routing(tapped.index.to(device), tapped.value.to(device))
    router = source.read(source.family.router(layer))
    activation = ACT2FN[source.config.get("hidden_act", "silu")]
    mixture = Mixture(source.experts(layer), router, shape.top_k, shape.renormalises, activation)
    text = Text(inputs, routing, len(held_out), held_out.to(device))
    shrinking = Shrinking(mixture, text, choice_of(recipe), tell)
    with source.named(layer):
        smaller, output = shrinking.run()
    below = output if recipe.calibrate == "after" else shrinking.wanted
    tapped.rest.add_(below.cpu().view_as(tapped.rest))
    record = {"layer": layer, **shrinking.record, "seconds": round(time.perf_counter() - start, 4)}
    return Made(layer, smaller, shrinking.cosines, record, Stream(layer + 1, tapped.rest))


def patch_calibrated(plan: Plan, folder: Path, state: State, advance: Advance) -> dict[str, str]:
    """Make all layers, then write all shards; returns the weight map (tensor name to file name)."""
    check_finite(plan, advance)
    shrink_checkpoint(plan, state, advance)
    with Reader() as reader:
        return write_packs(plan, folder, reader, partial(new_items, plan, state), lambda what, size: None)


def shrink_checkpoint(plan: Plan, state: State, advance: Advance) -> None:
    """Leave every MoE layer's new tensors in the state folder, and go on there after a kill."""
    assert plan.text is not None
    shape, family = plan.shape, plan.family
    stream = state.load_stream()
    for layer in shape.layers:
        if stream is not None and layer < stream.layer:
            advance(f"layer {layer}", plan.layer_bytes(layer))

    def tell(layer: int, stage: str) -> None:
        advance(f"layer {layer}: {stage}", 0)

    with Reader() as reader:
        source = Source(
            plan.checkpoint.config,
            family,
            shape,
            lambda name: reader.read(plan.spans[name]),
            lambda layer: read_experts(plan, reader, layer),
            partial(named, plan),
        )
        for made in shrink_layers(source, plan.recipe, plan.text, stream, tell):
            usage = torch.tensor(made.record["usage"])
            tensors = {"new.router": made.mixture.router, "cosines": made.cosines, "usage": usage}
            for name in PROJECTIONS:
                for expert in range(plan.kept):
                    tensors[f"new.{expert}.{name}"] = made.mixture.experts[name][expert]
            state.save_layer(made.layer, tensors, {**made.record, "bytes": plan.layer_bytes(made.layer)})
            state.save_stream(made.stream)
            advance(f"layer {made.layer}", plan.layer_bytes(made.layer))
            del made, tensors  # before the next layer is read


def new_items(plan: Plan, state: State, layer: int) -> list[Item]:
    """A layer's new tensors, as spans of the file that `shrink_checkpoint` left."""
    spans: dict[str, TensorSpan] = read_header(state.layer_file(layer))
    items = [Item.of(plan.family.router(layer), spans["new.router"])]
    for expert in range(plan.kept):
        for name in PROJECTIONS:
            items.append(Item.of(plan.family.expert(layer, expert, name), spans[f"new.{expert}.{name}"]))
    return items
