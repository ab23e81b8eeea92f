"""Calibration text on its way through a model, layer by layer, each on what the layers below it really produce."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..calibration.decoder import Decoder, Read, Tapped
from ..calibration.text import CalibrationText
from ..checkpoint.bytes import Reader
from ..families import Config, Family, MoeShape
from ..merging.experts import Expert
from ..merging.moe_layer import MoELayer, Text
from ..merging.routing import TokenRouting
from ..progress import FINISHED, ProgressCallback, ProgressEvent
from ..recipe import Grouped, Recipe
from .layer import moe_layer, named, read_experts
from .plan import Plan
from .state import State, Stream
from .text import measures

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A model to be read layer by layer, wherever it is."""

    config: Config
    family: Family
    shape: MoeShape
    read: Read
    experts: Callable[[int], Expert]  # of a MoE layer, stacked, for the caller to change
    named: Callable[[int], AbstractContextManager[None]]  # gives a complaint about an expert its tensor's name

    def moe_layer(self, layer: int) -> MoELayer:
        return moe_layer(self.config, self.shape, self.experts(layer), self.read(self.family.router(layer)))

    def shared(self, layer: int) -> dict[str, torch.Tensor]:
        """The shared expert of a MoE layer by projection, and its ``gate`` where it has one."""
        return {part: self.read(name) for part, name in self.family.shared_parts(layer).items()}


@dataclass(frozen=True)
class Heard:
    """A MoE layer, and what the text says to it. Whoever takes it adds a routed output to ``tapped.rest``."""

    layer: int
    tapped: Tapped
    mixture: MoELayer
    text: Text
    original: torch.Tensor | None  # what the model that is patched hands to the next layer, where layers aim at that
    start: float  # of the work on it, by `time.perf_counter`

    def passed_on(self, output: torch.Tensor) -> torch.Tensor:
        """What the next layer hears, given this one's routed output ``[tokens, hidden]``."""
        return self.tapped.rest.add_(output.cpu().view_as(self.tapped.rest))

    def without_experts(self) -> "Heard":
        """The same, for who has taken the experts."""
        return replace(self, mixture=self.mixture.without_experts())

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self.start, 4)


def heard_layers(
    source: Source, recipe: Recipe, text: CalibrationText, stream: Stream | None, progress: ProgressCallback
) -> Iterator[Heard]:
    """The MoE layers, one after the other.

    Args:
        stream: where to go on; None: at the bottom.

    Memory: one decoder layer without its experts in float32, one layer's experts in their own dtype, and twice
    ``[tokens, hidden]`` in float32: the stream, and the mixture's inputs. Four times under ``target: model``: the
    stream of the model that is patched, and what is wanted of the mixture.
    """
    shape, device = source.shape, recipe.device
    decoder = Decoder(source.config, source.family, shape, source.read, device)
    hidden = decoder.embed(text.ids).cpu() if stream is None else stream.hidden
    original = None
    if isinstance(recipe.merge, Grouped) and recipe.merge.target == "model":
        original = hidden.clone() if stream is None else stream.original
    for layer in range(0 if stream is None else stream.layer, max(shape.layers) + 1):
        start = time.perf_counter()
        with decoder.layer(layer) as module:
            if not module.is_mixture:
                hidden = module.forward(hidden)
                original = None if original is None else module.forward(original)
                continue
            aim = None if original is None else module.tap(original)
            tapped = module.tap(hidden)
        progress(ProgressEvent("read", layer))
        hidden = tapped.rest
        routing = TokenRouting(tapped.index.to(device), tapped.value.to(device))
        mixture = source.moe_layer(layer)
        target = None
        if aim is not None:
            original = unpatched(mixture, aim, device)
            target = (original - hidden).view_as(tapped.inputs).to(device)
            del aim
        held_out = text.held_out if measures(recipe) else torch.zeros(len(text.ids), dtype=torch.bool)
        shown = Text(tapped.inputs.to(device), routing, len(held_out), held_out.to(device), target)
        handed_over = [Heard(layer, tapped, mixture, shown, original, start)]
        del tapped, routing, mixture, target, shown  # what whoever takes it lets go of is gone
        yield handed_over.pop()


def unpatched(mixture: MoELayer, tapped: Tapped, device: str) -> torch.Tensor:
    """A layer's whole output, over ``tapped.rest``, with the routed experts of `mixture`."""
    routing = TokenRouting(tapped.index.to(device), tapped.value.to(device))
    output = mixture.output(tapped.inputs.to(device), routing)
    return tapped.rest.add_(output.cpu().view_as(tapped.rest))


def source_of(plan: Plan, reader: Reader) -> Source:
    """The checkpoint of a plan."""
    return Source(
        plan.checkpoint.config,
        plan.family,
        plan.shape,
        lambda name: reader.read(plan.spans[name]),
        partial(read_experts, plan, reader),
        partial(named, plan),
    )


def resumed(plan: Plan, state: State, progress: ProgressCallback) -> Stream | None:
    """Where a killed run left the text; None at the bottom."""
    stream = state.load_stream()
    if stream is not None:
        logger.info("continues at layer %d", stream.layer)
    for layer in plan.shape.layers:
        if stream is not None and layer < stream.layer:
            progress(ProgressEvent(FINISHED, layer, amount=plan.layer_bytes(layer), resumed=True))
    return stream
