"""Identity of a checkpoint: the bytes of its weights and of the small files that a result depends on.

The hash of a file of weights is computed from the hashes of its header and of its tensors, in the order of their
offsets. Tensors are hashed while a run reads them; only the others are read for the hash.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ..errors import CheckpointError
from ..files import (
    CONFIG,
    HASH,
    PIECE,
    hash_bytes,
    hash_file,
    read_checked,
    same_bytes,
    stamp,
    unchanged,
    write_checked,
)
from .companions import companions
from .header import TensorSpan, read_header
from .tokenizer_code import tokenizer_code

DIGESTS = "digests.json"
"""File in the state of an unfinished run: hashes of the tensors that were read so far."""
HEADER = -1
"""Stands for the header of a file, in place of an offset."""


class Digests:
    """Hashes of tensors, by file and offset.

    Args:
        spans: all tensors of the files.
        files: files of weights.
    """

    def __init__(self, spans: Iterable[TensorSpan], files: Iterable[Path]) -> None:
        self.known: dict[Path, dict[int, str]] = {file: {} for file in files}
        self._sizes: dict[Path, dict[int, int]] = {file: {} for file in self.known}
        for span in spans:
            if span.file in self._sizes and span.size:  # an empty tensor begins where the next one does
                self._sizes[span.file][span.begin] = span.size
        self._begins = {file: sorted(sizes) for file, sizes in self._sizes.items()}
        self._open: dict[tuple[Path, int], tuple[Any, int]] = {}  # a hasher, and the number of its bytes so far

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # a hasher cannot be sent to another process

    def add(self, file: Path, begin: int, data: memoryview) -> None:
        """Hash bytes that were read. A tensor is hashed only if its bytes come in order from its beginning."""
        begins = self._begins.get(file)
        if not begins or not len(data):
            return
        start = begins[max(0, bisect_right(begins, begin) - 1)]
        if start in self.known[file]:
            return
        hasher, done = (xxhash.xxh3_128(), 0) if begin == start else self._open.get((file, start), (None, 0))
        if hasher is None or start + done != begin:
            return
        hasher.update(data)
        done += len(data)
        self._open[file, start] = hasher, done
        if done >= self._sizes[file][start]:
            del self._open[file, start]
            self.known[file][start] = hasher.hexdigest()

    def of(self, span: TensorSpan) -> str | None:
        """Hash of a tensor; None for a part of a tensor, or a tensor without a hash so far."""
        whole = self._sizes.get(span.file, {}).get(span.begin) == span.size
        return self.known[span.file].get(span.begin) if whole else None

    def read(self, file: Path, begin: int) -> str:
        """Hash of the tensor at an offset, or of the `HEADER`; reads the bytes if it is not known."""
        known = self.known[file]
        if begin not in known:
            first, last = self._place(file, begin)
            known[begin] = _hash_range(file, first, last - first)
        return known[begin]

    def _place(self, file: Path, begin: int) -> tuple[int, int]:
        if begin != HEADER:
            return begin, begin + self._sizes[file][begin]
        return 0, self._begins[file][0] if self._begins[file] else file.stat().st_size

    def places(self, file: Path) -> list[int]:
        """The parts of a file's hash: the `HEADER`, and the offsets of its tensors."""
        return [HEADER, *self._begins[file]]

    def of_file(self, file: Path) -> str:
        """Hash of a whole file; reads the parts without a hash."""
        return combined([self.read(file, begin) for begin in self.places(file)])

    def covers(self, file: Path) -> bool:
        """Whether all parts of a file have a hash."""
        return self.known[file].keys() >= set(self.places(file))


def combined(digests: Iterable[str]) -> str:
    """The hash of a file, from those of its header and its tensors in the order of their offsets."""
    return hash_bytes(*(digest.encode() for digest in digests))


def hash_weights(path: Path) -> str:
    """The hash of a file of weights; reads the whole file.

    Raises:
        CheckpointError: it is not a safetensors file.
    """
    return Digests(read_header(path).values(), [path]).of_file(path)


def hash_header(path: Path) -> str:
    """The hash of the header of a file of weights.

    Raises:
        CheckpointError: it is not a safetensors file.
    """
    return Digests(read_header(path).values(), [path]).read(path, HEADER)


def _hash_range(path: Path, begin: int, size: int) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while size:
            piece = file.read(min(PIECE, size))
            if not piece:
                raise CheckpointError(f"{path.name} ended early: it was cut while in use")
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


class Identity:
    """The current state of the files of a checkpoint that a result depends on.

    Small files (configuration, tokenizer, chat templates, generation settings, code of model and tokenizer) are hashed
    at once.

    Args:
        folder: folder of the checkpoint.
        config: its configuration.
        shards: its files of weights; missing files, as of a model on the Hub, are ignored.
        spans: all its tensors.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], shards: Iterable[Path], spans: Iterable[TensorSpan]
    ) -> None:
        self.weights = {shard.name: shard for shard in shards if shard.is_file()}
        self._stamps = {name: stamp(shard) for name, shard in self.weights.items()}
        self.digests = Digests(spans, self.weights.values())
        code = folder.glob("*.py") if config.get("auto_map") else ()
        small = {folder / CONFIG, *companions(folder), *tokenizer_code(folder), *folder.glob("adapter_*"), *code}
        self._small = {
            path.relative_to(folder).as_posix(): {**stamp(path), HASH: hash_file(path)}
            for path in sorted(small)
            if path.is_file()
        }

    def record(self) -> dict[str, dict[str, Any]]:
        """Plain values: by the name of a file its stamp, and its hash if that is known."""
        weights = {
            name: {**stamped, HASH: self.digests.of_file(self.weights[name])} if self._hashed(name) else dict(stamped)
            for name, stamped in self._stamps.items()
        }
        return weights | self._small

    def _hashed(self, name: str) -> bool:
        return "blob" not in self._stamps[name] and self.digests.covers(self.weights[name])

    def changed(self, recorded: Any, digests: Mapping[str, Mapping[str, str]] | None = None) -> tuple[list[str], bool]:
        """Compare with the record of a run; reads files whose times differ.

        Args:
            recorded: the result of `record` at that time.
            digests: the hashes of an unfinished run, from `read_digests`.

        Returns:
            The files with other bytes now, and whether the record proves the other files equal.
        """
        if not isinstance(recorded, Mapping):
            return [], False
        others, proven = [], True
        now = self._stamps | self._small
        for name in sorted({*recorded, *now}):
            same = name in recorded and name in now and self._same(name, recorded[name], (digests or {}).get(name))
            if same is None:
                proven = False
            elif not same:
                others.append(name)
        return others, proven

    def _same(self, name: str, recorded: Any, digests: Mapping[str, str] | None) -> bool | None:
        """Whether the file has the recorded bytes; None if the record does not determine it."""
        if name in self._small or not isinstance(recorded, Mapping):
            return same_bytes(recorded, self._small.get(name))
        now = self._stamps[name]
        if unchanged(recorded, now):
            return True
        if "blob" in now or "blob" in recorded or recorded.get("bytes") != now["bytes"]:
            return False
        path = self.weights[name]
        if HASH in recorded:
            return self.digests.of_file(path) == recorded[HASH]
        places = {str(begin): begin for begin in self.digests.places(path)}
        for begin, digest in (digests or {}).items():
            if begin not in places or self.digests.read(path, places[begin]) != digest:
                return False
        return True if (digests or {}).keys() >= places.keys() else None

    def add_digests(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Use the hashes of an earlier run of the same bytes, so that these are not read again."""
        for name, known in digests.items():
            if path := self.weights.get(name):
                self.digests.known[path] |= {int(begin): digest for begin, digest in known.items()}

    def settle(self) -> None:
        """Hash all remaining parts, and check that no file has changed since the beginning.

        Raises:
            CheckpointError: a file has changed.
        """
        for name, stamped in self._stamps.items():
            if "blob" not in stamped:
                self.digests.of_file(self.weights[name])
        self.check()

    def check(self) -> None:
        """Raises:
        CheckpointError: a file has changed since the beginning of the run.
        """
        try:
            for name, path in self.weights.items():
                if stamp(path) != self._stamps[name]:
                    raise CheckpointError(f"{name} was changed while it was read; run the same command again")
        except OSError as error:
            raise CheckpointError(f"{name} was removed while it was read ({error.strerror})") from error

    def save_digests(self, state: Path) -> None:
        """Write the known hashes into the state of a run, before any result of these bytes."""
        for name, path in self.weights.items():
            if "blob" not in self._stamps[name]:
                self.digests.read(path, HEADER)
        values = {
            name: {str(begin): digest for begin, digest in self.digests.known[path].items()}
            for name, path in self.weights.items()
            if "blob" not in self._stamps[name]
        }
        if any(values.values()):
            write_checked(state / DIGESTS, values)


def read_digests(state: Path) -> dict[str, dict[str, str]] | None:
    """The hashes that `Identity.save_digests` wrote; None if the file is missing or damaged."""
    digests = read_checked(state / DIGESTS)
    return digests if isinstance(digests, dict) else None


@dataclass(frozen=True)
class RunDifference:
    """The difference between a recorded run and the current run."""

    fields: tuple[str, ...]
    """The fields that differ; ``source`` also if the bytes of its files differ."""
    files: tuple[str, ...] = ()
    """The files of the source with other bytes."""
    proven: bool = True
    """Whether the record proves all other files of the source equal."""
    inside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of fields that are mappings, the keys that differ."""

    def __bool__(self) -> bool:
        return bool(self.fields)

    def __str__(self) -> str:
        return " and ".join(map(self._label, self.fields))

    def _label(self, name: str) -> str:
        keys = self.inside.get(name)
        return f"{name} ({', '.join(keys)})" if keys else "list of files" if name == "files" else name


def differing(
    recorded: Mapping[str, Any],
    current: Mapping[str, Any],
    identity: Identity | None = None,
    digests: Mapping[str, Mapping[str, str]] | None = None,
) -> RunDifference:
    """Compare two runs as plain values; their ``files``, from `Identity.record`, by bytes.

    Args:
        recorded: the recorded run.
        current: the current run.
        identity: of the current checkpoint, whose files are read if times differ; None: compare the records only.
        digests: as for `Identity.changed`.
    """
    fields = {key for key in {*recorded, *current} - {"files"} if recorded.get(key) != current.get(key)}
    inside = {key: _keys(recorded.get(key), current.get(key)) for key in fields}
    before, now = recorded.get("files"), current.get("files")
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return RunDifference(tuple(sorted(fields | ({"files"} if before != now else set()))), inside=inside)
    if identity is not None:
        files, proven = identity.changed(before, digests)
    else:
        files = [name for name in sorted({*before, *now}) if not same_bytes(before.get(name), now.get(name))]
        proven = True
    return RunDifference(tuple(sorted(fields | ({"source"} if files else set()))), tuple(files), proven, inside)


def _keys(before: Any, now: Any) -> tuple[str, ...]:
    """The keys of two mappings whose values differ; none of other values."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return ()
    return tuple(sorted(name for name in {*before, *now} if before.get(name) != now.get(name)))
