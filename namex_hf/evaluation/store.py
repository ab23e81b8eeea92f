"""Results on disk, named by the hash of everything that determines them, so that a killed run goes on from there.

Cells of a comparison have a file each. Responses to lm-eval's requests are lines of a log: lm-eval's own cache stores
pickles, which this package does not load.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from ..checkpoint.identity import differing
from ..errors import CheckpointError, OutputError
from ..files import HASH, hash_bytes, read_json, write_text

CELLS = "cells"


def key_of(*parts: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with their hash."""
    return {**values, HASH: hash_bytes(json.dumps(values).encode())}


def unsealed(path: Path) -> dict[str, Any] | None:
    """The values of a file that `sealed` made; None where it is missing or damaged."""
    try:
        values = read_json(path)
    except CheckpointError:
        return None
    digest = values.pop(HASH, None)
    return values if digest == sealed(values)[HASH] else None


class CellFiles:
    """The finished cells of a folder.

    Args:
        run: identity of the run, plain.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        # The folder is claimed for the bytes of the source; times of its files are no part of a cell's name.
        self.folder, self.run = folder / CELLS, {name: value for name, value in run.items() if name != "files"}

    def path(self, cell: Mapping[str, Any]) -> Path:
        """Of a cell's file, whether it is there or not."""
        return self.folder / f"{key_of(self.run, cell)[:24]}.json"

    def read(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured; None of a cell that is not finished, or whose file is damaged or of another cell."""
        entry = unsealed(self.path(cell))
        return entry["result"] if entry and entry.get("key") == key_of(self.run, cell) else None

    def write(self, cell: Mapping[str, Any], label: str, result: Mapping[str, Any]) -> None:
        """Store what was measured, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"key": key_of(self.run, cell), "label": label, "cell": cell, "result": result}
        write_text(self.path(cell), json.dumps(sealed(entry), indent=1) + "\n")


class AnswerLog:
    """One model's responses to the requests of one task, on disk batch by batch.

    A file a process, ``answers-RANK.jsonl``: a line says what the run is, the batch size of a kind of request, or the
    response to one request, named by the hash of the request. Lines are synced, and each ends with its hash. A line
    that is cut or damaged is dropped with all after it, and their batches are requested again: batches are made from
    all requests, so a response does not depend on when the run was killed.

    Args:
        folder: where the files are; made if need be.
        identity: what makes the run this run, plain.
        rank: of this process. All processes' answers are read, its own file is written.

    Raises:
        OutputError: the folder has answers of another run.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._identity = json.loads(json.dumps(identity))
        self._answers: dict[str, Any] = {}
        self._batches: dict[str, int] = {}
        own, whole = folder / f"answers-{rank}.jsonl", 0
        for path in sorted(folder.glob("answers-*.jsonl")):
            read = self._read(path)
            if path == own:
                whole = read
        self._file = own.open("ab")
        self._file.truncate(whole)
        if not whole:
            self._write([{"run": self._identity}])

    def _read(self, path: Path) -> int:
        """Take in the whole lines of a file; returns how many bytes they are."""
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            entry = _entry(line)
            if entry is None:
                break
            whole += len(line)
            if "run" in entry:
                self._check(path, entry["run"])
            elif "batch" in entry:
                self._batches[entry["batch"]] = entry["size"]
            else:
                self._answers[entry["request"]] = entry["answer"]
        return whole

    def _check(self, path: Path, found: dict[str, Any]) -> None:
        if changed := differing(found, self._identity):
            raise OutputError(
                f"{path} has answers of a run with another {changed}; use --overwrite or another --output_path"
            )

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        self._file.write(b"".join(_line(entry) for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep the answers of one batch, by their requests' keys."""
        self._answers.update(answers)
        self._write({"request": key, "answer": answer} for key, answer in answers.items())

    def batch(self, kind: str) -> int | None:
        """The batch size found for a kind of request, if one was."""
        return self._batches.get(kind)

    def keep_batch(self, kind: str, size: int) -> None:
        """Keep it: a run that goes on must cut its batches as before."""
        self._batches[kind] = size
        self._write([{"batch": kind, "size": size}])

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _line(entry: Mapping[str, Any]) -> bytes:
    """An entry as a line, with its hash at the end."""
    text = json.dumps(entry).encode()
    return text + b" " + hash_bytes(text).encode() + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it was cut or damaged."""
    text, _, digest = line.rpartition(b" ")
    if digest != hash_bytes(text).encode() + b"\n":
        return None
    entry = json.loads(text)
    return entry if isinstance(entry, dict) else None
