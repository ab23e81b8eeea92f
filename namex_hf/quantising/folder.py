"""A checkpoint as quantisation leaves it: the dequantised numbers, in an ordinary folder of the same class."""

import json
from pathlib import Path

import torch

from ..checkpoint.bytes import Reader
from ..checkpoint.companions import carry
from ..checkpoint.header import read_header
from ..checkpoint.shard import Item, shard_names, write_index, write_shard, write_tensors
from ..files import CONFIG, write_text
from ..progress import ProgressCallback, no_progress
from .layers import gptq_layers, rounded_layers
from .matrices import Matrices


def write_quantised(
    matrices: Matrices,
    out: Path,
    bits: int,
    ids: torch.Tensor | None = None,
    device: str = "cpu",
    progress: ProgressCallback = no_progress,
) -> None:
    """Write the folder, a shard a decoder layer, every number in the checkpoint's own dtype.

    Args:
        bits: of a level of routed experts; the other matrices have `DENSE`.
        ids: ``[sequences, length]``, text for GPTQ; None: round to nearest, which reads none.

    Memory: a layer's matrices, and what `gptq_layers` says.

    Raises:
        CheckpointError: a matrix holds NaN or infinity.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = shard_names(len(matrices.outline.decoder_layers) + 1)
    quantised = matrices.dense | matrices.outline.places.keys()
    with Reader() as reader:
        layers = rounded_layers(matrices, reader, bits)
        if ids is not None:
            layers = gptq_layers(matrices, reader, bits, ids, device, progress)
        for name, tensors in zip(names, layers, strict=False):
            write_tensors(out / name, tensors)
        rest = [Item.of(name, span) for name, span in matrices.spans.items() if name not in quantised]
        write_shard(out / names[-1], rest, reader)
    spans = {tensor: name for name in names for tensor in read_header(out / name)}
    write_index(out, spans, sum(span.size for span in matrices.spans.values()))
    carry(matrices.checkpoint.folder, out)
    write_text(out / CONFIG, json.dumps(matrices.checkpoint.config, indent=2) + "\n")
