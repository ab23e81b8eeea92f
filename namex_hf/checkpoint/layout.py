"""A common view of both layouts: every routed expert's matrices under their per-expert names.

A fused tensor of transformers 5 holds its experts end to end, so each expert's matrix is a span of bytes too.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from ..errors import CheckpointError
from ..families import original_family
from ..families.outline import FUSED, Outline, TensorSpec, check_counts, check_tensors, outline_of
from ..printable import printable
from .header import TensorSpan
from .source import Checkpoint

NAMED = 8
"""Number of left-out tensors whose names are printed."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Buffers that older releases of transformers saved, and that every class computes."""


def outline_in(checkpoint: Checkpoint) -> Outline:
    """The outline of a checkpoint's model, after a look at its files.

    Raises:
        FamilyError: as `outline_of`, or numbers that the files cannot hold.
        CheckpointError: the tensors are quantised.
    """
    _refuse_quantised(checkpoint)
    original_family(checkpoint.config).check(checkpoint.config)
    check_counts(checkpoint.config, tensors_of(checkpoint.spans))
    return outline_of(checkpoint.config)


def per_expert(checkpoint: Checkpoint, outline: Outline) -> dict[str, TensorSpan]:
    """The checked spans of all tensors of the checkpoint's class, under the names of `Outline`.

    Raises:
        CheckpointError: a tensor of the class is missing, has a wrong shape or dtype, or belongs to an expert that the
            configuration does not count.
    """
    spans = _under_own_names(checkpoint.spans, outline)
    _expect_experts(spans, outline)
    _check_dtypes(spans, outline)
    _refuse_uncounted(spans, outline)
    foreign = set(check_tensors(outline, tensors_of(spans)))
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


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    for name, span in checkpoint.spans.items():
        if span.dtype.is_floating_point and span.dtype.itemsize == 1:
            raise CheckpointError(
                f"tensor {name} is {span.dtype}; accepted: bfloat16, float16, float32 (quantised tensors are not read)"
            )
    if isinstance(stated := checkpoint.config.get("quantization_config"), dict):
        raise CheckpointError(
            f"config.json: 'quantization_config' is {stated.get('quant_method')!r}; accepted: none (quantised tensors "
            "are not read)"
        )


def _expect_experts(spans: dict[str, TensorSpan], outline: Outline) -> None:
    for layer in outline.shape.layers:
        for name in (*outline.experts(layer), outline.file(outline.router(layer))):
            if name not in spans:
                count = outline.shape.experts_of(layer)
                raise CheckpointError(f"tensor {name} is missing; config.json counts {count} experts a layer")


def _check_dtypes(spans: dict[str, TensorSpan], outline: Outline) -> None:
    for layer in outline.shape.layers:
        dtypes = {spans[name].dtype for name in outline.experts(layer)}
        if len(dtypes) != 1 or not dtypes.issubset(FLOATS):
            found = ", ".join(sorted(map(str, dtypes)))
            raise CheckpointError(f"experts of layer {layer} are {found}; accepted: one of bfloat16, float16, float32")


def _under_own_names(spans: dict[str, TensorSpan], outline: Outline) -> dict[str, TensorSpan]:
    """The same tensors; stacked experts apart, and older names as the class is saved today."""
    fused = {outline.fused(layer, name): (layer, name) for layer in outline.shape.layers for name in FUSED}
    own = {name: span for name, span in spans.items() if name in outline.tensors}
    for name, span in spans.items():
        if name in own:
            continue
        renamed = outline.in_class(name)
        parts = _parts(span, name, outline, *fused[renamed]) if renamed in fused else {}
        for part, of_expert in (parts or {outline.by_class_name.get(renamed, name): span}).items():
            if part in own:
                whole = "within a fused tensor" if parts else f"as {name}"
                raise CheckpointError(f"tensor {part} is there twice: by itself, and {whole}")
            own[part] = of_expert
    return own


def _parts(span: TensorSpan, name: str, outline: Outline, layer: int, kind: str) -> dict[str, TensorSpan]:
    """The matrices in one tensor of a layer's stacked experts."""
    shape, count = outline.shape, outline.shape.experts_of(layer)
    expected = (count, 2 * shape.width, shape.hidden) if kind == FUSED[0] else (count, shape.hidden, shape.width)
    if span.shape != expected:
        raise CheckpointError(f"tensor {name} is {list(span.shape)}; config.json makes it {list(expected)}")
    halves = {"gate_proj": slice(0, shape.width), "up_proj": slice(shape.width, 2 * shape.width)}
    if kind != FUSED[0]:
        return {outline.expert(layer, expert, "down_proj"): span.part(expert) for expert in range(count)}
    return {
        outline.expert(layer, expert, projection): span.part(expert, rows)
        for expert in range(count)
        for projection, rows in halves.items()
    }


def _refuse_uncounted(spans: dict[str, TensorSpan], outline: Outline) -> None:
    layers, first = outline.decoder_layers, outline.shape.layers[0]
    prefix, suffix = layers[0].removesuffix("0"), outline.blocks[first].removeprefix(f"{layers[first]}.")
    of_experts = re.compile(rf"{re.escape(prefix)}(\d+)\.{re.escape(suffix)}\.experts\.(?:(\d+)\.)?")
    for name in spans:
        match = None if name in outline.tensors else of_experts.match(outline.in_class(name))
        if match is None or int(match[1]) >= len(layers):  # a prediction head, which no class here has
            continue
        layer, expert = int(match[1]), int(match[2] or 0)
        if layer not in outline.shape.layers:
            raise CheckpointError(
                f"tensor {name} belongs to layer {layer}, which config.json does not make a MoE layer"
            )
        if expert >= outline.shape.experts_of(layer):
            count = outline.shape.experts_of(layer)
            raise CheckpointError(f"tensor {name} is expert {expert}; config.json counts {count} experts")
