"""What tells a checkpoint from every other: its weights and the small files that a result depends on, by their bytes.

The hash of a file of weights is made of the hashes of its header and of its tensors, in the order of their places. A
run reads the tensors anyway, and they are hashed then; only what it did not read is read for the hash.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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

DIGESTS = "digests.json"
"""In the state of an unfinished run: hashes of the tensors that were read so far."""
HEADER = -1
"""In place of an offset: the header of a file."""


class Digests:
    """Hashes of tensors, by the file and the offset that they begin at.

    Args:
        spans: all tensors of the files.
        files: of weights.
    """

    def __init__(self, spans: Iterable[TensorSpan], files: Iterable[Path]) -> None:
        self.known: dict[Path, dict[int, str]] = {file: {} for file in files}
        self._sizes: dict[Path, dict[int, int]] = {file: {} for file in self.known}
        for span in spans:
            if span.file in self._sizes and span.size:  # an empty tensor begins where the next one does
                self._sizes[span.file][span.begin] = span.size
        self._begins = {file: sorted(sizes) for file, sizes in self._sizes.items()}
        self._open: dict[tuple[Path, int], tuple[Any, int]] = {}  # hasher, and bytes that it has

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # a hasher does not travel to another process

    def add(self, file: Path, begin: int, data: memoryview) -> None:
        """Take bytes that were read. Those of a tensor count where they come in order, from its beginning on."""
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
        """Hash of a tensor; None of a part of one, or of one that was not read."""
        whole = self._sizes.get(span.file, {}).get(span.begin) == span.size
        return self.known[span.file].get(span.begin) if whole else None

    def read(self, file: Path, begin: int) -> str:
        """Hash of the tensor at an offset, or of the `HEADER`; its bytes are read where they were not."""
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
        """What the hash of a file is made of: the `HEADER`, and the offsets of its tensors."""
        return [HEADER, *self._begins[file]]

    def of_file(self, file: Path) -> str:
        """Hash of a whole file; what was not read yet is read."""
        return combined([self.read(file, begin) for begin in self.places(file)])

    def covers(self, file: Path) -> bool:
        """Whether the hash of a file is known without reading."""
        return self.known[file].keys() >= set(self.places(file))


def combined(digests: Iterable[str]) -> str:
    """The hash of a file, of those of its header and its tensors in the order of their places."""
    return hash_bytes(*(digest.encode() for digest in digests))


def hash_weights(path: Path) -> str:
    """The hash of a file of weights, all of it read.

    Raises:
        CheckpointError: it is none.
    """
    return Digests(read_header(path).values(), [path]).of_file(path)


def hash_header(path: Path) -> str:
    """The hash of the header of a file of weights.

    Raises:
        CheckpointError: it is none.
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
    """The files of a checkpoint that a result depends on, as they are now.

    Small files (configuration, tokenizer, chat templates, generation settings, code of the model) are hashed at once.

    Args:
        folder: of the checkpoint.
        config: its configuration.
        shards: its files of weights; those that are not here, as of a model on the Hub, are left out.
        spans: all its tensors.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], shards: Iterable[Path], spans: Iterable[TensorSpan]
    ) -> None:
        self.weights = {shard.name: shard for shard in shards if shard.is_file()}
        self._stamps = {name: stamp(shard) for name, shard in self.weights.items()}
        self.digests = Digests(spans, self.weights.values())
        code = folder.glob("*.py") if config.get("auto_map") else ()
        small = {folder / CONFIG, *companions(folder), *folder.glob("adapter_*"), *code}
        self._small = {
            path.relative_to(folder).as_posix(): {**stamp(path), HASH: hash_file(path)}
            for path in sorted(small)
            if path.is_file()
        }

    def record(self) -> dict[str, dict[str, Any]]:
        """Plain: by the name of a file its stamp, and its hash where that is known."""
        weights = {
            name: {**found, HASH: self.digests.of_file(self.weights[name])} if self._hashed(name) else dict(found)
            for name, found in self._stamps.items()
        }
        return weights | self._small

    def _hashed(self, name: str) -> bool:
        return "blob" not in self._stamps[name] and self.digests.covers(self.weights[name])

    def changed(self, recorded: Any, digests: Mapping[str, Mapping[str, str]] | None = None) -> tuple[list[str], bool]:
        """Compare with the record of a run. Files are read where times differ.

        Args:
            recorded: of `record`, then.
            digests: of an unfinished run, as `read_digests` gives them.

        Returns:
            The files that are others now, and whether bytes are on record for all the rest.
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
        """None where nothing that is on record tells."""
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

    def take(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Go on from the hashes that an earlier run of the same bytes left, so that they are not read again."""
        for name, known in digests.items():
            if path := self.weights.get(name):
                self.digests.known[path] |= {int(begin): digest for begin, digest in known.items()}

    def settle(self) -> None:
        """Read what is not hashed yet, and look whether any file has changed since the beginning.

        Raises:
            CheckpointError: one has.
        """
        for name, found in self._stamps.items():
            if "blob" not in found:
                self.digests.of_file(self.weights[name])
        self.check()

    def check(self) -> None:
        """Raises:
        CheckpointError: a file is another than at the beginning of the run.
        """
        try:
            for name, path in self.weights.items():
                if stamp(path) != self._stamps[name]:
                    raise CheckpointError(f"{name} was changed while it was read; run the same command again")
        except OSError as error:
            raise CheckpointError(f"{name} was removed while it was read ({error.strerror})") from error

    def save_digests(self, state: Path) -> None:
        """Write the hashes that are known into the state of a run, before what was made of these bytes."""
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
    """What `Identity.save_digests` wrote; None where that is missing or damaged."""
    found = read_checked(state / DIGESTS)
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Difference:
    """Between the run on record and the run of now."""

    fields: tuple[str, ...]
    """Those that differ; ``source`` also where the bytes of its files do."""
    files: tuple[str, ...] = ()
    """Of the source, that are others."""
    proven: bool = True
    """Whether bytes are on record for all files of the source."""

    def __bool__(self) -> bool:
        return bool(self.fields)

    def __str__(self) -> str:
        return " and ".join(self.fields)


def differing(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    identity: Identity | None = None,
    digests: Mapping[str, Mapping[str, str]] | None = None,
) -> Difference:
    """Compare two runs, plain; their ``files``, as of `Identity.record`, by bytes.

    Args:
        found: the run on record.
        wanted: the run of now.
        identity: of the checkpoint of now, read where times differ; None: only what is on record tells.
        digests: as for `Identity.changed`.
    """
    fields = {key for key in {*found, *wanted} - {"files"} if found.get(key) != wanted.get(key)}
    recorded, now = found.get("files"), wanted.get("files")
    if not isinstance(recorded, Mapping) or not isinstance(now, Mapping):
        return Difference(tuple(sorted(fields | ({"files"} if recorded != now else set()))))
    if identity is not None:
        files, proven = identity.changed(recorded, digests)
    else:
        files = [name for name in sorted({*recorded, *now}) if not same_bytes(recorded.get(name), now.get(name))]
        proven = True
    return Difference(tuple(sorted(fields | ({"source"} if files else set()))), tuple(files), proven)
