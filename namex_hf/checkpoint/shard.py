"""Writing safetensors files tensor by tensor: a few are in memory at a time, beyond what their maker holds."""

import json
import os
from collections import deque
from collections.abc import Callable, Sequence
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
Source = TensorSpan | Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Item:
    """A tensor to be written: its bytes in another file, or a function that makes it when its turn comes."""

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
    metadata: dict[str, str],
    record: Record | None = None,
) -> None:
    """Write a safetensors file under a temporary name, sync it, and rename it: it is whole or it is not there.

    Tensors are made here, one after the other, while another thread writes those before.

    Args:
        record: takes down size and hash before the file has its name.

    Memory: at most ``AHEAD`` tensors that wait to be written.
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
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], record: Record | None = None
) -> None:
    """`write_shard` of what is in memory. Unlike the safetensors library's writer it says "disk full" as an OSError."""
    path.parent.mkdir(exist_ok=True)
    items = [Item(name, tensor.dtype, tuple(tensor.shape), partial(_same, tensor)) for name, tensor in tensors.items()]
    with Reader() as reader:
        write_shard(path, items, reader, metadata, record)


def write_index(folder: Path, weight_map: dict[str, str], size: int) -> None:
    """Write which file holds which tensor, of one file too: a program that opens every ``*.safetensors`` otherwise may
    take a file for weights that is none.

    Args:
        size: of all tensors, in bytes.
    """
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _header(items: Sequence[Item], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for item in items:
        offsets = [position, position + item.size]
        header[item.name] = {"dtype": NAMES[item.dtype], "shape": list(item.shape), "data_offsets": offsets}
        position += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format wants the data to start on a multiple of 8; on a multiple of 64 mapped tensors are aligned for the
    # processor's kernels, whose rounding can depend on it.
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
