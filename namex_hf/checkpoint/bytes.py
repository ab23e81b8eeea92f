"""Reading tensor bytes into memory, and copying them between files."""

import errno
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch
import xxhash

from ..errors import CheckpointError
from ..files import PIECE
from .header import TensorSpan
from .identity import Digests

COPY_PIECE = 16 << 20
NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class Reader(AbstractContextManager["Reader"]):
    """Reads tensor spans, and keeps their files open. It stores no tensor bytes.

    Args:
        digests: receives the hashes of the bytes that are read.
    """

    def __init__(self, digests: Digests | None = None) -> None:
        self._digests = digests
        self._files: dict[Path, BinaryIO] = {}
        self._opening = Lock()  # the thread of a writer copies while another thread reads
        self._ahead = ThreadPoolExecutor(1)

    def __exit__(self, *_: object) -> None:
        self._ahead.shutdown()
        for file in self._files.values():
            file.close()

    def _file(self, path: Path) -> BinaryIO:
        with self._opening:
            if path not in self._files:
                self._files[path] = path.open("rb", buffering=0)
            return self._files[path]

    def read_into(self, span: TensorSpan, target: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor of the span's shape and dtype."""
        view = target.view(-1).view(torch.uint8).numpy().data
        number, done = self._file(span.file).fileno(), 0
        piece = span.size if self._digests is None else PIECE
        while done < span.size:
            count = os.preadv(number, [view[done : done + piece]], span.begin + done)
            if count == 0:
                raise CheckpointError(f"{span.file.name} ended at byte {span.begin + done}: it was cut while in use")
            if self._digests is not None:
                self._digests.add(span.file, span.begin + done, view[done : done + count])
            done += count

    def read(self, span: TensorSpan) -> torch.Tensor:
        target = torch.empty(span.shape, dtype=span.dtype)
        self.read_into(span, target)
        return target

    def expect(self, spans: Iterable[TensorSpan]) -> None:
        """Let the kernel read these spans ahead, so that disk and processor work at the same time."""
        if hasattr(os, "posix_fadvise"):
            self._ahead.submit(self._advise, list(spans))  # the system call blocks while the disk's queue is full

    def _advise(self, spans: list[TensorSpan]) -> None:
        for span in spans:
            os.posix_fadvise(self._file(span.file).fileno(), span.begin, span.size, os.POSIX_FADV_WILLNEED)

    def copy(self, span: TensorSpan, target: BinaryIO) -> str:
        """Append a span's bytes to an unbuffered file; returns their hash.

        If their hash is known, the kernel copies them, where it can.
        """
        source, known = self._file(span.file).fileno(), self._digests.of(span) if self._digests else None
        if known is None:
            return _copy_hashed(source, span, target.fileno())
        copy_range(source, span.begin, span.size, target.fileno(), span.file.name)
        return known


def _copy_hashed(source: int, span: TensorSpan, target: int) -> str:
    digest, done = xxhash.xxh3_128(), 0
    while done < span.size:
        data = os.pread(source, min(PIECE, span.size - done), span.begin + done)
        if not data:
            raise CheckpointError(f"{span.file.name} ended at byte {span.begin + done}: it was cut while in use")
        digest.update(data)
        write_all(target, data)
        done += len(data)
    return digest.hexdigest()


def write_all(number: int, data: bytes | memoryview) -> None:
    """Write to a file descriptor until all is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(number, view) :]


def copy_range(source: int, begin: int, size: int, target: int, name: str) -> None:
    """Copy bytes between file descriptors; the target is written at its own position."""
    done, in_kernel = 0, hasattr(os, "copy_file_range")
    while done < size:
        try:
            if in_kernel:
                count = os.copy_file_range(source, target, size - done, begin + done)
            else:
                count = os.write(target, os.pread(source, min(COPY_PIECE, size - done), begin + done))
        except OSError as error:
            if not in_kernel or error.errno not in NO_KERNEL_COPY:
                raise
            in_kernel = False
            continue
        if count == 0:
            raise CheckpointError(f"{name} ended at byte {begin + done}: it was cut while in use")
        done += count


Record = Callable[[Path, dict[str, Any]], None]
"""Records the size and the origin or hash of a file before the file gets its name."""


def copy_file(source: Path, target: Path, fsync_pool: Executor, record: Record) -> Future[None]:
    """Copy a file through the kernel; the copy gets its name once it is whole and on disk.

    Args:
        fsync_pool: waits for the disk while the caller copies the next file.

    Returns:
        Done when the copy has its name.
    """
    part = target.with_name(target.name + ".part")
    with source.open("rb", buffering=0) as file, part.open("wb", buffering=0) as copy:
        size = source.stat().st_size
        copy_range(file.fileno(), 0, size, copy.fileno(), source.name)
    return fsync_pool.submit(_sync_and_rename, part, target, record, {"bytes": size, "copy_of": source.name})


def _sync_and_rename(part: Path, target: Path, record: Record, values: dict[str, Any]) -> None:
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    record(target, values)
    part.replace(target)
