"""Results on disk, each named by the hash of everything that determines it, so that a killed run goes on from there.

Cells of a comparison and responses to lm-eval's requests are lines of such a log: lm-eval's own cache stores pickles,
which this package does not load.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ..checkpoint.identity import differing
from ..errors import OutputError
from ..files import HASH, hash_bytes

MODELS = "models"
"""Folder beside the results with the models that were patched to be scored."""


def key_of(*parts: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with their hash."""
    return {**values, HASH: hash_bytes(json.dumps(values).encode())}


def unsealed(values: Any) -> dict[str, Any] | None:
    """The values that `sealed` was given; None where they are damaged."""
    digest = values.pop(HASH, None) if isinstance(values, dict) else None
    return values if digest is not None and digest == sealed(values)[HASH] else None


class ResultLog(dict[str, Any]):
    """Results of one run by their keys, on disk as soon as they are added.

    A file a process: its first line says what the run is, each other line is one result. Lines are synced, and each
    holds its hash. A line that is cut or damaged is dropped with all after it, and its result is measured again.

    Args:
        path: the file of this process, made with its folder if need be. Other ``*.jsonl`` beside it are read too.
        identity: what makes the run this run, plain.

    Raises:
        OutputError: the folder has results of another run.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._identity = json.loads(json.dumps(identity))
        whole = {file: self._read(file) for file in sorted(path.parent.glob("*.jsonl"))}.get(path, 0)
        self._file = path.open("ab")
        if self._file.tell() > whole:
            self._file.truncate(whole)
        if not whole:
            self._write({"run": self._identity})

    def _read(self, path: Path) -> int:
        """Take in the whole lines of a file; returns how many bytes they are."""
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                entry = unsealed(json.loads(line)) if line.endswith(b"\n") else None
            except ValueError:
                break
            if entry is None:
                break
            whole += len(line)
            if "run" not in entry:
                self[entry["key"]] = entry["result"]
            elif changed := differing(entry["run"], self._identity):
                raise OutputError(
                    f"{path} has results of a run with another {changed}; use --overwrite or another --out"
                )
        return whole

    def _write(self, *entries: Mapping[str, Any]) -> None:
        self._file.write(b"".join(json.dumps(sealed(entry)).encode() + b"\n" for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, results: Mapping[str, Any]) -> None:
        """Keep results by their keys."""
        self.update(results)
        self._write(*({"key": key, "result": result} for key, result in results.items()))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
