"""``budget: damage``: what fewer experts cost each layer is measured on calibration text, then they are dealt out."""

from dataclasses import replace
from typing import Any

import torch

from ..calibration.decoder import Decoder
from ..calibration.text import CalibrationText
from ..families import MoeShape
from ..merging.budget import LOSS_TOKENS, MERGE_TOKENS, candidate_counts, interpolate_error, least_damage
from ..merging.calibrated import Shrinking
from ..merging.moe_layer import MoELayer, Text
from ..merging.routing import TokenRouting
from ..progress import ProgressCallback, ProgressEvent
from ..recipe import Grouped, Recipe
from .sources import LayerSource
from .text_pass import unpatched


@torch.no_grad()
def spend(
    source: LayerSource, recipe: Recipe, text: CalibrationText, progress: ProgressCallback
) -> list[dict[str, Any]]:
    """Measure every layer by itself, the others as they are, and give more experts to those that cost more.

    A layer's damage with the mean number of experts is the loss on held-out text with that layer alone merged, not
    fitted, over the original's; with another number it is as much larger as the error of the layer's own output.

    Returns:
        Of every MoE layer ``layer``, ``experts``, how many it keeps, and what was measured: ``loss``, in nats a token,
        and ``errors`` by number of experts.

    Memory: one decoder layer in float32, one layer's experts, what `Shrinking` says for ``MERGE_TOKENS``; for each
    layer ``[LOSS_TOKENS, hidden]`` in float32; at the end the model's head in float32.

    Raises:
        NotFiniteError: an expert holds NaN or infinity.
    """
    shape, device = source.shape, recipe.device
    merge = recipe.merge
    assert isinstance(merge, Grouped)
    if merge.experts == shape.experts:
        return [{"layer": layer, "experts": shape.experts} for layer in shape.layers]
    chosen = shorter(text)
    ids, held_out, sources = text.ids[chosen], text.held_out[chosen], text.sources[chosen]
    decoder = Decoder(source.config, source.outline, source.read, device)
    hidden = decoder.embed(ids).cpu()
    damaged: dict[int, torch.Tensor] = {}
    errors: dict[int, dict[int, float]] = {}
    for layer in range(source.config["num_hidden_layers"]):
        with decoder.layer(layer) as module:
            if not module.is_mixture:
                for stream in (hidden, *damaged.values()):
                    module.forward(stream)
                continue
            mixture = source.moe_layer(layer)
            for stream in damaged.values():
                unpatched(decoder, layer, mixture, module.tap(stream), device)
            tapped = module.tap(hidden)
        routing = TokenRouting(tapped.index.to(device), tapped.value.to(device))
        inputs = tapped.inputs.to(device)
        target = mixture.output(inputs, routing)
        shown = Text(inputs, routing, sources, held_out.to(device), target)
        with source.named(layer):
            errors[layer], output = _errors_by_count(mixture, shown, merge, recipe)
        damaged[layer] = (hidden + output.cpu().view_as(hidden))[held_out]
        decoder.pass_on(layer, hidden, target)
        progress(ProgressEvent("measured", layer))
    before, *after = decoder.losses([hidden[held_out], *damaged.values()], ids[held_out])
    return dealt_out(errors, [max(0.0, loss - before) for loss in after], merge.experts, shape.experts)


def measuring_memory(shape: MoeShape) -> int:
    """Bytes of the short text that passes through for every layer."""
    return 4 * len(shape.layers) * LOSS_TOKENS * shape.hidden


def dealt_out(
    errors: dict[int, dict[int, float]], losses: list[float], mean: int, experts: int
) -> list[dict[str, Any]]:
    """What `spend` returns, from what was measured.

    Args:
        errors: of a layer's output, by layer and number of experts.
        losses: what each layer with the mean number of experts adds to the loss, in nats a token.
    """
    record, curves = [], []
    for (layer, by_count), loss in zip(errors.items(), losses, strict=True):
        unit = loss / by_count[mean] if by_count[mean] else 0.0
        curves.append(interpolate_error({count: unit * error for count, error in by_count.items()}, experts))
        record.append({"layer": layer, "loss": loss, "errors": {str(count): e for count, e in by_count.items()}})
    counts = least_damage(curves, mean * len(curves))
    return [{**one, "experts": count} for one, count in zip(record, counts, strict=True)]


def shorter(text: CalibrationText) -> torch.Tensor:
    """Numbers of some of a text's sequences, spread over it, held out and not."""
    length, held_out = text.ids.shape[1], text.held_out
    rows = []
    for part, tokens in ((~held_out, MERGE_TOKENS), (held_out, LOSS_TOKENS)):
        sequences = part.nonzero().flatten()
        number = min(len(sequences), max(1, tokens // length))
        rows.append(sequences[torch.linspace(0, len(sequences) - 1, number).round().long()])
    return torch.cat(rows)


def _errors_by_count(
    mixture: MoELayer, text: Text, merge: Grouped, recipe: Recipe
) -> tuple[dict[int, float], torch.Tensor]:
    """The error of a layer's output by number of experts, and the output with the recipe's own number."""
    errors, result = {}, text.inputs
    for count in candidate_counts(len(mixture.router), merge.experts):
        shrinking = Shrinking(
            mixture, text, replace(merge, experts=count), recipe.seed, recipe.calibration.error_weights, fits=False
        )
        _, output = shrinking.run()
        errors[count] = shrinking.record["errors"][-1]["error"]
        if count == merge.experts:
            result = output
    return errors, result
