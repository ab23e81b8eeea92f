"""Calibration text on its way through a model, one decoder layer at a time, on what the result's layers answer."""

import torch

from ..calibration.decoder import Decoder, Tapped
from ..calibration.text import CalibrationText
from ..families import MoeShape
from ..merging.moe_layer import MoELayer, Text
from ..merging.routing import TokenRouting
from ..recipe import Grouped, Recipe
from .result import PipelineState
from .sources import LayerSource
from .text import measures


def aims_at_model(recipe: Recipe) -> bool:
    """Whether layers aim at the original model's hidden states."""
    return isinstance(recipe.merge, Grouped) and recipe.merge.target == "model"


class TextPass:
    """The one owner of hidden states: it takes them to a MoE layer, and on with what the layer answers.

    Several results may be made of each layer, where all pass on the same answer: what was done for the first is not
    done again.

    Memory: one decoder layer without its experts in float32, and twice ``[tokens, hidden]`` in float32: hidden states,
    and the mixture's inputs. Four times under ``target: model``: the hidden states of the model that is patched, and
    the target of the mixture.
    """

    def __init__(self, source: LayerSource, recipe: Recipe, text: CalibrationText, state: PipelineState) -> None:
        self._source, self._recipe, self.text = source, recipe, text
        self._decoder = Decoder(source.config, source.outline, source.read, recipe.device)
        self._next, aims = state.layer, aims_at_model(recipe)
        self._decoder.check(text.ids)
        self.hidden = self._decoder.embed(text.ids).cpu() if state.hidden is None else state.hidden
        self.original = state.original
        if aims and self.original is None:
            self.original = self.hidden.clone()
        self._tapped: Tapped | None = None
        self._aim: Tapped | None = None
        self._received: Text | None = None  # by the tapped layer
        self._passed = state.layer  # layers that have passed their answers on

    def tap(self, layer: int) -> None:
        """Take the text through the dense layers below a MoE layer, and through that without its routed experts."""
        if self._next <= layer:
            self._received = None  # the next layer needs the memory
        for number in range(self._next, layer + 1):
            with self._decoder.layer(number) as module:
                if module.is_mixture:
                    self._aim = None if self.original is None else module.tap(self.original)
                    self._tapped = module.tap(self.hidden)
                else:
                    self.hidden = module.forward(self.hidden)
                    self.original = None if self.original is None else module.forward(self.original)
        if self._tapped is not None:
            self._next, self.hidden = layer + 1, self._tapped.rest

    def activations(self, mixture: MoELayer) -> Text:
        """What the tapped layer receives, and its target."""
        if self._received is not None:
            return self._received
        tapped, aim, device = self._tapped, self._aim, self._recipe.device
        assert tapped is not None
        self._tapped = self._aim = target = None
        routing = TokenRouting(tapped.index.to(device), tapped.value.to(device))
        if aim is not None:
            self.original = unpatched(self._decoder, self._next - 1, mixture, aim, device)
            target = (self.original - self.hidden).view_as(tapped.inputs).to(device)
        held_out = torch.zeros(len(self.text.ids), dtype=torch.bool)
        if measures(self._recipe):
            held_out = self.text.held_out
        self._received = Text(tapped.inputs.to(device), routing, self.text.sources, held_out.to(device), target)
        return self._received

    def pass_on(self, output: torch.Tensor) -> None:
        """Add the layer's routed output ``[tokens, hidden]``: that is what the next layer receives."""
        if self._passed < self._next:
            self._decoder.pass_on(self._next - 1, self.hidden, output)
            self._passed = self._next


def unpatched(decoder: Decoder, layer: int, mixture: MoELayer, tapped: Tapped, device: str) -> torch.Tensor:
    """A layer's whole output, over ``tapped.rest``, with the routed experts of `mixture`."""
    routing = TokenRouting(tapped.index.to(device), tapped.value.to(device))
    decoder.pass_on(layer, tapped.rest, mixture.output(tapped.inputs.to(device), routing))
    return tapped.rest


def streams_memory(recipe: Recipe, shape: MoeShape) -> int:
    """Bytes of the text as hidden states: as they are, as inputs and twice as outputs, and what `target` adds."""
    return (6 if aims_at_model(recipe) else 4) * recipe.calibration.tokens * shape.hidden * 4
