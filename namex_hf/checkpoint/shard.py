"""Writing of safetensors files tensor by tensor, with few tensors in memory at a time."""

import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import xxhash

from ..files import HASH, INDEX, PIECE, hash_bytes, write_text
from .bytes import Reader, Record, write_all
from .header import NAMES, TensorSpan
from .identity import combined

AHEAD = 6
METADATA = {"format": "pt"}
Source = TensorSpan | Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Item:
    """A tensor to write: its bytes in another file, or a function that computes it when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: Source

    @classmethod
    def of(cls, name: str, span: TensorSpan) -> "Item":
        return cls(name, span.dtype, span.shape, span)

    @property
    def size(self) -> int:
        """In bytes."""
        return TensorSpan(Path(), 0, self.dtype, self.shape).size


def write_shard(
    path: Path,
    items: Sequence[Item],
    reader: Reader,
    record: Record | None = None,
    metadata: Mapping[str, str] = METADATA,
) -> None:
    """Write a safetensors file atomically: under a temporary name, then sync and rename.

    Tensors are computed here, one after the other; another thread writes them meanwhile.

    Args:
        record: records size and hash before the file gets its name.

    Memory: at most ``AHEAD`` tensors that wait for the other thread.
    """
    part, waiting = path.with_name(path.name + ".part"), deque[Future[str]]()
    header, digests = _header(items, metadata), []
    with part.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
        write_all(file.fileno(), header)
        for item in items:
            if isinstance(item.source, TensorSpan):
                waiting.append(writer.submit(reader.copy, item.source, file))
            else:
                waiting.append(writer.submit(_write_tensor, file.fileno(), item, item.source()))
            if len(waiting) > AHEAD:
                digests.append(waiting.popleft().result())
        digests += [written.result() for written in waiting]
        os.fsync(file.fileno())
    if record is not None:
        places = [digest for item, digest in zip(items, digests, strict=True) if item.size]
        size = len(header) + sum(item.size for item in items)
        record(path, {"bytes": size, HASH: combined([hash_bytes(header), *places])})
    part.replace(path)


def write_tensors(
    path: Path,
    tensors: dict[str, torch.Tensor],
    record: Record | None = None,
    metadata: Mapping[str, str] = METADATA,
) -> None:
    """`write_shard` of tensors in memory. A full disk is an OSError, unlike in the safetensors library."""
    path.parent.mkdir(exist_ok=True)
    items = [Item(name, tensor.dtype, tuple(tensor.shape), partial(_same, tensor)) for name, tensor in tensors.items()]
    with Reader() as reader:
        write_shard(path, items, reader, record, metadata)


def shard_names(count: int) -> list[str]:
    """transformers' names: one file, or numbered ones."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, weight_map: dict[str, str], size: int) -> None:
    """Write the index of tensors and their files, also for a single file. Without an index some programs load every
    ``*.safetensors`` file as weights.

    Args:
        size: bytes of all tensors.
    """
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _header(items: Sequence[Item], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {**metadata}}
    position = 0
    for item in items:
        offsets = [position, position + item.size]
        header[item.name] = {"dtype": NAMES[item.dtype], "shape": list(item.shape), "data_offsets": offsets}
        position += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format requires the data to start on a multiple of 8. On a multiple of 64 mapped tensors are also aligned for
    # the processor's kernels, whose rounding can depend on alignment.
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(number: int, item: Item, tensor: torch.Tensor) -> str:
    tensor = tensor.contiguous()
    if tensor.dtype != item.dtype or tuple(tensor.shape) != item.shape:
        raise AssertionError(
            f"{item.name}: made {tensor.dtype} {tuple(tensor.shape)}, planned {item.dtype} {item.shape}"
        )
    view, digest = tensor.view(-1).view(torch.uint8).numpy().data, xxhash.xxh3_128()
    for begin in range(0, len(view), PIECE):
        piece = view[begin : begin + PIECE]
        digest.update(piece)
        write_all(number, piece)
    return digest.hexdigest()
