"""Finished cells, a file each, so that a run that was killed goes on from there.

A file is named by the hash of everything that determines the cell: the model, what it is scored on, versions, and the
recipe with its calibration text.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files import HASH, hash_bytes, read_json, write_text

CELLS = "cells"


def key_of(run: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """SHA-256 of what determines a cell. Args: run, cell, plain."""
    return hashlib.sha256(json.dumps([run, cell], sort_keys=True).encode()).hexdigest()


def _hash(result: Mapping[str, Any]) -> str:
    return hash_bytes(json.dumps(result).encode())


class Journal:
    """The finished cells of a folder.

    Args:
        run: what makes the run this run, plain.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        # The folder is claimed for the bytes of the source; times of its files are no part of a cell's name.
        self.folder, self.run = folder / CELLS, {name: value for name, value in run.items() if name != "files"}

    def path(self, cell: Mapping[str, Any]) -> Path:
        """Of a cell's file, whether it is there or not."""
        return self.folder / f"{key_of(self.run, cell)[:24]}.json"

    def read(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured; None of a cell that is not finished, or whose file was damaged or meant another."""
        try:
            entry = read_json(self.path(cell), OutputError)
        except OutputError:
            return None
        result = entry.get("result")
        if not isinstance(result, dict) or entry.get("key") != key_of(self.run, cell):
            return None
        return result if entry.get(HASH) == _hash(result) else None

    def write(self, cell: Mapping[str, Any], label: str, result: Mapping[str, Any]) -> None:
        """Keep what was measured, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"key": key_of(self.run, cell), "label": label, "cell": cell, "result": result, HASH: _hash(result)}
        write_text(self.path(cell), json.dumps(entry, indent=1) + "\n")
