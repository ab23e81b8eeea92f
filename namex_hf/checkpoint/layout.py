"""A common view of both layouts: every routed expert's matrices under their per-expert names.

A fused tensor of transformers 5 holds its experts end to end, so each expert's matrix is a span of bytes too.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from ..errors import CheckpointError
from ..families import Family, MoeShape
from ..families.outline import TensorSpec, check_counts, check_tensors, outline_of
from ..printable import printable
from .header import TensorSpan
from .source import Checkpoint

NAMED = 8
"""Number of left-out tensors whose names are printed."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
OF_EXPERTS = re.compile(r"^model\.layers\.(\d+)\.mlp\.experts\.(?:(\d+)\.)?")
RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Buffers that older releases of transformers saved, and that every class computes."""


def per_expert(checkpoint: Checkpoint, family: Family, shape: MoeShape) -> dict[str, TensorSpan]:
    """The checked spans of all tensors of the checkpoint's class, under the family's per-expert names.

    Raises:
        FamilyError: the class cannot be built from the configuration.
        CheckpointError: a tensor of the class is missing, has a wrong shape or dtype, or belongs to an expert that the
            configuration does not count.
    """
    check_counts(checkpoint.config, tensors_of(checkpoint.spans))
    spans = _split_fused(checkpoint.spans, family, shape)
    _expect_experts(spans, family, shape)
    _check_dtypes(spans, family, shape)
    _refuse_uncounted(spans, family, shape, checkpoint.config["num_hidden_layers"])
    foreign = set(check_tensors(outline_of(checkpoint.config), tensors_of(spans)))
    return {name: span for name, span in spans.items() if name not in foreign}


def left_out(checkpoint: Checkpoint, spans: dict[str, TensorSpan]) -> list[str]:
    """Names of the tensors that a checkpoint's class does not have.

    Args:
        spans: as of `per_expert`.
    """
    places = {(span.file, span.begin) for span in spans.values()}
    return [
        name for name, span in checkpoint.spans.items() if name not in spans and (span.file, span.begin) not in places
    ]


def left_out_line(names: Iterable[str]) -> str:
    """The line to print about `left_out`; empty if every class computes all of these tensors."""
    names = [name for name in names if not RECOMPUTED.search(name)]
    if not names:
        return ""
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return printable(f"left out, since the model's class does not have them: {', '.join(names[:NAMED])}{rest}")


def tensors_of(spans: Mapping[str, TensorSpan]) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor, from the headers."""
    return {name: TensorSpec(span.shape, span.dtype) for name, span in spans.items()}


def _expect_experts(spans: dict[str, TensorSpan], family: Family, shape: MoeShape) -> None:
    """Raises:
    CheckpointError: there are fewer experts than the configuration counts; their class would be too large to build.
    """
    for layer in shape.layers:
        count = shape.experts_of(layer)
        for name in (*family.experts(layer, count), family.router(layer)):
            if name not in spans:
                raise CheckpointError(f"tensor {name} is missing; config.json counts {count} experts a layer")


def _check_dtypes(spans: dict[str, TensorSpan], family: Family, shape: MoeShape) -> None:
    for layer in shape.layers:
        dtypes = {spans[name].dtype for name in family.experts(layer, shape.experts_of(layer))}
        if len(dtypes) != 1 or not dtypes.issubset(FLOATS):
            found = ", ".join(sorted(map(str, dtypes)))
            raise CheckpointError(f"experts of layer {layer} are {found}; accepted: one of bfloat16, float16, float32")


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


def _refuse_uncounted(spans: dict[str, TensorSpan], family: Family, shape: MoeShape, depth: int) -> None:
    for name in spans:
        match = OF_EXPERTS.search(name)
        if match is None or int(match[1]) >= depth:  # a prediction head, which no class here has
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
