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
from ..merging.routing import TokenRouting, expert_output, routed_output
from .folder import PatchedFolder

LENGTH = 512  # tokens of a sequence, where the model reads so many
ASKED = 1024  # tokens, spread over the text, that every expert is asked about


@dataclass(frozen=True)
class Layer:
    """One MoE layer."""

    cosines: (
        torch.Tensor
    )  # float32 [N, N], means over the tokens asked about of the cosine between two experts' outputs
    usage: torch.Tensor  # int64 [N], tokens of the text that each expert received


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

    Base experts and other routers are left out: what is heard is the text as the experts' own mixture makes it. With
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
    found: dict[int, Layer] = {}
    asked = 0
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
            some = tapped.inputs[::every][:ASKED]
            outputs = (expert_output(some, experts.expert(e).to(some), folder.outline.activation) for e in range(count))
            said = torch.stack([normalize(output, dim=-1).flatten() for output in outputs])
            asked = len(some)
            found[layer] = Layer(said @ said.T / asked, routing.count(count))
            output = routed_output(tapped.inputs, routing, experts, folder.outline.activation)
            decoder.pass_on(layer, hidden, output)
            del experts, said, output  # before the next layer is read
    return Answers(found, text.sha256, text.tokens, asked)


def _text(folder: PatchedFolder, tokens: int) -> CalibrationText:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except Exception as error:  # whatever a foreign tokenizer raises
        raise CalibrationError(
            f"{folder.path} has no tokenizer that transformers can open ({type(error).__name__}); accepted: --tokens 0"
        ) from error
    longest = folder.checkpoint.config.get("max_position_embeddings")
    length = min(LENGTH, longest if isinstance(longest, int) else LENGTH, tokens)
    return calibration_text("packaged", tokenizer, tokens, length, folder.recipe.seed)
