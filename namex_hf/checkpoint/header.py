"""Headers of safetensors files: the place of every tensor, checked before any tensor is read."""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import open_regular, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorSpan:
    """The bytes of one tensor in one file."""

    file: Path
    begin: int  # offset in the file, in bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, index: int, rows: slice | None = None) -> "TensorSpan":
        """The span of ``tensor[index]``, or of ``tensor[index, rows]``: both are contiguous."""
        row = math.prod(self.shape[2:]) * self.dtype.itemsize
        begin, shape = self.begin + index * self.shape[1] * row, self.shape[1:]
        if rows is not None:
            begin, shape = begin + rows.start * row, (rows.stop - rows.start, *self.shape[2:])
        return replace(self, begin=begin, shape=shape)


def read_header(path: Path) -> dict[str, TensorSpan]:
    """Spans of all tensors of a file, by name.

    Raises:
        CheckpointError: the file is missing or truncated, or its header is wrong: a length beyond the file, no JSON, an
            unknown dtype, or offsets that do not fit the shape, overlap, leave holes or exceed the file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise CheckpointError(
                    f"{path.name}: its header claims {length} bytes in a file of {size}; truncated or no safetensors"
                )
            entries = parse_json(file.read(length), f"{path.name}: its header")
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path.name}: its header is {type(entries).__name__}; a JSON object is needed")
    entries.pop("__metadata__", None)
    spans = {name: _span(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(path, spans, 8 + length, size)
    return spans


def read_metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of a file that this package wrote."""
    with open_regular(path) as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})


def _span(path: Path, name: str, entry: Any, data: int) -> TensorSpan:
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        numbers_are_whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        numbers_are_whole = False
    if not numbers_are_whole:
        raise CheckpointError(
            f"{path.name}: the header entry of {name} is {json.dumps(entry)[:200]}; needed: dtype (one of "
            f"{', '.join(DTYPES)}), shape and data_offsets in whole numbers"
        )
    span = TensorSpan(path, data + begin, dtype, shape)
    if end - begin != span.size:
        raise CheckpointError(
            f"{path.name}: {name} has {end - begin} bytes in the header; "
            f"{list(shape)} of {entry['dtype']} takes {span.size}"
        )
    return span


def _check_layout(path: Path, spans: dict[str, TensorSpan], data: int, size: int) -> None:
    position, previous = data, "the header"
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].size)):
        if span.begin != position:
            kind = "overlaps" if span.begin < position else "leaves a hole after"
            raise CheckpointError(f"{path.name}: {name} {kind} {previous} (offset {span.begin - data})")
        position, previous = span.begin + span.size, name
    if position != size:
        raise CheckpointError(
            f"{path.name}: the file has {size} bytes; its header describes {position}: truncated or padded"
        )
