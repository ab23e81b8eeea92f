"""The matrices of a checkpoint quantised, a decoder layer at a time: by rounding, or by GPTQ on calibration text."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..calibration.decoder import Decoder, Tapped
from ..checkpoint.bytes import Reader
from ..merging.experts import PROJECTIONS, Expert, ExpertWeights
from ..merging.routing import Activation, TokenRouting, expert_output, neurons
from ..patching.checkpoint_source import require_finite
from ..progress import ProgressCallback, ProgressEvent, no_progress
from .gptq import gptq
from .grid import rounded_to_nearest
from .matrices import DENSE, Matrices

Tensors = dict[str, Tensor]
"""Dequantised matrices by their names in files, in the checkpoint's dtype."""


def rounded_layers(matrices: Matrices, reader: Reader, bits: int) -> Iterator[Tensors]:
    """Each layer's matrices, rounded to nearest. Args: bits, of a level of routed experts.

    Raises:
        CheckpointError: a matrix holds NaN or infinity.
    """
    for layer in range(len(matrices.outline.decoder_layers)):
        yield {name: _rounded(matrices, reader, name, bits) for name in matrices.names(layer)}


def gptq_layers(
    matrices: Matrices,
    reader: Reader,
    bits: int,
    ids: Tensor,
    device: str = "cpu",
    progress: ProgressCallback = no_progress,
) -> Iterator[Tensors]:
    """Each layer's matrices, routed experts by GPTQ; the inputs of a layer come from the quantised layers below it.

    Args:
        ids: ``[sequences, length]``, calibration text.

    Memory: a decoder layer without its experts in float32; the quantised layer in the checkpoint's dtype; one expert in
    float32 and float64; three times ``[tokens, hidden]`` in float32.

    Raises:
        CheckpointError: a matrix holds NaN or infinity.
    """
    outline, spans = matrices.outline, matrices.spans

    def read(name: str) -> Tensor:
        file = outline.stored(name, spans)
        return _rounded(matrices, reader, file, bits) if file in matrices.dense else reader.read(spans[file])

    decoder = Decoder(matrices.checkpoint.config, outline, read, device)
    decoder.check(ids)
    hidden = decoder.embed(ids).cpu()
    layers = len(outline.decoder_layers)
    for layer in range(layers):
        made = {
            name: _rounded(matrices, reader, name, bits) for name in matrices.names(layer) if name in matrices.dense
        }
        with decoder.layer(layer) as module:
            tapped = module.tap(hidden) if module.is_mixture else None
            if tapped is None:
                module.forward(hidden)
        if tapped is not None:
            experts, output = _quantised_experts(matrices, reader, layer, bits, tapped, device)
            decoder.pass_on(layer, tapped.rest, output)
            made |= experts
        progress(ProgressEvent("quantised", layer=layer, done=layer + 1, total=layers))
        yield made


def quantised_expert(expert: Expert, inputs: Tensor, activation: Activation, bits: int) -> Expert:
    """An expert by GPTQ: gate and up for its tokens, down for what the quantised gate and up make of them.

    Args:
        expert: float32.
        inputs: ``[tokens, hidden]``, those that the router sends to it.
    """
    assert expert.gate is not None
    both = gptq(torch.cat([expert.gate, expert.up]), inputs.T @ inputs, bits)
    gate, up = both.split(len(expert.up))
    activations = neurons(inputs, ExpertWeights(gate, up, expert.down), activation)
    return ExpertWeights(gate, up, gptq(expert.down, activations.T @ activations, bits))


def _quantised_experts(
    matrices: Matrices, reader: Reader, layer: int, bits: int, tapped: Tapped, device: str
) -> tuple[Tensors, Tensor]:
    """The routed experts of a layer, and their output ``[tokens, hidden]``."""
    outline, made = matrices.outline, Tensors()
    routing, inputs = TokenRouting(tapped.index.to(device), tapped.value.to(device)), tapped.inputs.to(device)
    output = torch.zeros_like(inputs)
    for number in range(outline.shape.experts_of(layer)):
        names = {projection: outline.expert(layer, number, projection) for projection in PROJECTIONS}
        matrix = {projection: _finite(matrices, reader, name) for projection, name in names.items()}
        read = ExpertWeights.of(matrix.__getitem__)
        token, gate = routing.of(number)
        new = quantised_expert(read.to(inputs), inputs[token], outline.activation, bits).to(read.up)
        made |= {names[projection]: quantised for projection, quantised in new.items()}
        output.index_add_(0, token, gate[:, None] * expert_output(inputs[token], new.to(inputs), outline.activation))
    return made, output


def _rounded(matrices: Matrices, reader: Reader, name: str, bits: int) -> Tensor:
    matrix = _finite(matrices, reader, name)
    return rounded_to_nearest(matrix, DENSE if name in matrices.dense else bits).to(matrix.dtype)


def _finite(matrices: Matrices, reader: Reader, name: str) -> Tensor:
    span = matrices.spans[name]
    matrix = reader.read(span)
    require_finite(name, span, matrix)
    return matrix
