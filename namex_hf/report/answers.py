"""What the experts of a patched folder answer to calibration text, and how often each is asked."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from ..calibration.decoder import Decoder
from ..calibration.text import CalibrationText, calibration_text
from ..checkpoint.bytes import Reader
from ..errors import CalibrationError
from ..families.family import context_of
from ..merging.routing import TokenRouting, expert_output, on_tokens, routed_output
from .folder import PatchedFolder

LENGTH = 512  # tokens of a sequence, where the model reads so many
ASKED = 1024  # tokens, spread over the text, that every expert is asked about


@dataclass(frozen=True)
class Layer:
    """One MoE layer."""

    cosines: torch.Tensor
    """Float32 ``[N, N]``: of two experts' outputs, means over the tokens that are asked about."""
    usage: torch.Tensor
    """Int64 ``[N]``: tokens of the text that each expert received."""


@dataclass(frozen=True)
class Answers:
    """All MoE layers, on one text."""

    layers: dict[int, Layer]
    sha256: str  # of the text
    tokens: int
    asked: int


@torch.no_grad()
def answers(folder: PatchedFolder, tokens: int) -> Answers:
    """Take packaged calibration text through the layers, routed by the linear router alone, and ask every expert.

    Base experts and other routers are left out: the hidden states are those that the experts' own mixture makes. With
    the recipe's own number of tokens it is the text that the recipe read, if that was the packaged one.

    Args:
        tokens: of the text, at most.

    Memory: one layer's experts, one of them in float32, the stream of the text in float32 three times, and the answers
    of all experts to ``ASKED`` tokens.

    Raises:
        CalibrationError: no tokenizer that transformers can open, or too few tokens for a sequence.
    """
    text = _text(folder, tokens)
    config = folder.checkpoint.config
    if folder.shape.counts is None:  # else only the patched class has layers of different numbers of experts
        config = {**config, "model_type": folder.outline.family.model_type}
    every = max(1, text.tokens // ASKED)
    layers: dict[int, Layer] = {}
    sampled = 0
    with Reader() as reader:
        outline, spans = folder.outline, folder.spans
        decoder = Decoder(config, outline, lambda name: reader.read(spans[outline.stored(name, spans)]))
        hidden = decoder.embed(text.ids)
        for layer in range(max(folder.shape.layers) + 1):
            with decoder.layer(layer) as module:
                if not module.is_mixture:
                    hidden = module.forward(hidden)
                    continue
                tapped = module.tap(hidden)
            experts, routing = folder.experts(reader, layer), TokenRouting(tapped.index, tapped.value)
            count = experts.count
            sample = tapped.inputs[::every][:ASKED]
            activation = folder.outline.activation
            outputs = (on_tokens(expert_output, sample, experts.expert(e), activation) for e in range(count))
            directions = torch.stack([normalize(output, dim=-1).flatten() for output in outputs])
            sampled = len(sample)
            layers[layer] = Layer(directions @ directions.T / sampled, routing.count(count))
            output = routed_output(tapped.inputs, routing, experts, activation)
            decoder.pass_on(layer, hidden, output)
            del experts, directions, output  # before the next layer is read
    return Answers(layers, text.sha256, text.tokens, sampled)


def _text(folder: PatchedFolder, tokens: int) -> CalibrationText:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except Exception as error:  # whatever a foreign tokenizer raises
        raise CalibrationError(
            f"{folder.path} has no tokenizer that transformers can open ({type(error).__name__}); accepted: --tokens 0"
        ) from error
    length = min(LENGTH, context_of(folder.checkpoint.config) or LENGTH, tokens)
    return calibration_text("packaged", tokenizer, tokens, length, folder.recipe.seed)
