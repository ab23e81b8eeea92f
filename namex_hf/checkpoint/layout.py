"""One view of both layouts: every routed expert's matrices by their per-expert names, wherever their bytes are.

A fused tensor of transformers 5 holds its experts end to end, so each expert's matrix is a span of bytes as well.
"""

import re

import torch

from ..errors import CheckpointError
from ..families import PROJECTIONS, Family, MoeShape
from .header import TensorSpan
from .source import Checkpoint

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
OF_EXPERTS = re.compile(r"\.(\d+)\.mlp\.experts\.(?:(\d+)\.)?")


def per_expert(checkpoint: Checkpoint, family: Family, shape: MoeShape) -> dict[str, TensorSpan]:
    """All spans of a checkpoint under the family's per-expert names, checked against its configuration.

    Raises:
        CheckpointError: an expert, router or shared tensor is missing, has a wrong shape or dtype, or is one that the
            configuration does not count.
    """
    spans = _split_fused(checkpoint.spans, family, shape)
    for layer in shape.layers:
        wanted = {
            family.expert(layer, expert, projection): shape.of(projection)
            for expert in range(shape.experts_of(layer))
            for projection in PROJECTIONS
        }
        dtypes = {spans[name].dtype for name in wanted if name in spans}
        wanted[family.router(layer)] = (shape.experts_of(layer), shape.hidden)
        for part, name in family.shared_parts(layer).items():
            wanted[name] = (1, shape.hidden) if part == "gate" else shape.of_shared(part)
        for name, expected in wanted.items():
            if name not in spans:
                raise CheckpointError(
                    f"tensor {name} is missing; config.json counts {shape.experts_of(layer)} experts a layer"
                )
            if spans[name].shape != expected:
                raise CheckpointError(
                    f"tensor {name} is {list(spans[name].shape)}; config.json makes it {list(expected)}"
                )
        if len(dtypes) != 1 or not dtypes.issubset(FLOATS):
            found = ", ".join(sorted(map(str, dtypes)))
            raise CheckpointError(f"experts of layer {layer} are {found}; accepted: one of bfloat16, float16, float32")
    _refuse_uncounted(spans, family, shape)
    return spans


def _split_fused(spans: dict[str, TensorSpan], family: Family, shape: MoeShape) -> dict[str, TensorSpan]:
    whole, parts = dict(spans), {}
    for layer in shape.layers:
        count = shape.experts_of(layer)
        gate_up = whole.pop(family.fused(layer, "gate_up_proj"), None)
        down = whole.pop(family.fused(layer, "down_proj"), None)
        if gate_up is not None:
            _expect(gate_up, family.fused(layer, "gate_up_proj"), (count, 2 * shape.width, shape.hidden))
            for expert in range(count):
                gate, up = slice(0, shape.width), slice(shape.width, 2 * shape.width)
                parts[family.expert(layer, expert, "gate_proj")] = gate_up.part(expert, gate)
                parts[family.expert(layer, expert, "up_proj")] = gate_up.part(expert, up)
        if down is not None:
            _expect(down, family.fused(layer, "down_proj"), (count, shape.hidden, shape.width))
            for expert in range(count):
                parts[family.expert(layer, expert, "down_proj")] = down.part(expert)
    for name in parts:
        if name in whole:
            raise CheckpointError(f"tensor {name} is there twice: by itself, and within a fused tensor")
    return whole | parts


def _expect(span: TensorSpan, name: str, shape: tuple[int, ...]) -> None:
    if span.shape != shape:
        raise CheckpointError(f"tensor {name} is {list(span.shape)}; config.json makes it {list(shape)}")


def _refuse_uncounted(spans: dict[str, TensorSpan], family: Family, shape: MoeShape) -> None:
    for name in spans:
        match = OF_EXPERTS.search(name)
        if match is None:
            continue
        layer, expert = int(match[1]), int(match[2] or 0)
        if layer not in shape.layers:
            raise CheckpointError(
                f"tensor {name} belongs to layer {layer}, which config.json does not make a MoE layer"
            )
        if expert >= shape.experts_of(layer):
            raise CheckpointError(
                f"tensor {name} is expert {expert}; config.json counts {shape.experts_of(layer)} experts"
            )
