"""Names of the files of a model folder, what tells a file from another, and how a small file is written.

What this package adds to a model lies in a folder of its own, ``namex/``, so that a program which opens every
``*.safetensors`` file of a model folder meets the model alone. Releases before 0.2.0 put it beside the weights:
`found` reads both places.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

CONFIG, CARD, SINGLE, INDEX = "config.json", "README.md", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
OURS = "namex"
"""The folder of all that this package adds."""
RECIPE, REPORT, SCORES = f"{OURS}/recipe.yaml", f"{OURS}/report.json", f"{OURS}/scores.json"
STATISTICS, PICTURES, PAGE = f"{OURS}/statistics.safetensors", f"{OURS}/pictures", "report.html"
BEFORE_0_2 = {
    RECIPE: "namex_recipe.yaml",
    REPORT: "namex_report.json",
    SCORES: "namex_scores.json",
    STATISTICS: "namex_statistics.safetensors",
    PICTURES: "namex_report",
}
"""Where releases before 0.2.0 put the same."""


def found(folder: Path, name: str) -> Path:
    """Where a file of `BEFORE_0_2` lies in a folder; the place of today where it is in neither."""
    now = folder / name
    before = folder / BEFORE_0_2[name]
    return before if before.exists() and not now.exists() else now


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file so that it is whole or not there; its folder is made where it is missing."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text, in UTF-8."""
    write_bytes(path, text.encode())


HASH = "xxh3_128"
PIECE = 1 << 20  # bytes that are hashed while they are still in the processor's cache
BLOB = re.compile(r"(?:.*/)?blobs/([0-9a-f]{40}|[0-9a-f]{64})")


def stamp(path: Path) -> dict[str, Any]:
    """What tells a file from another, without its bytes: the name of its blob in a Hub cache, which is a hash already;
    elsewhere its size in bytes and its times in nanoseconds."""
    if path.is_symlink() and "snapshots" in path.absolute().parts:
        match = BLOB.fullmatch(path.readlink().as_posix())
        if match is not None:
            return {"blob": match[1]}
    found = path.stat()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}


def unchanged(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two stamps are of the same bytes beyond doubt; where this is False, hashes decide."""
    return all(recorded.get(name) == value for name, value in now.items() if name != HASH)


def same_bytes(recorded: Any, now: Any) -> bool:
    """Whether two records of a file, stamps with hashes, are of the same bytes."""
    if not isinstance(recorded, Mapping) or not isinstance(now, Mapping):
        return False
    if HASH in recorded and HASH in now:
        return bool(recorded[HASH] == now[HASH])
    return unchanged(recorded, now)


def hash_bytes(*parts: bytes | memoryview) -> str:
    """128 bits, in hexadecimal digits, of bytes that are in memory."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """`hash_bytes` of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def write_checked(path: Path, value: Any) -> None:
    """Write a plain value as JSON, with its hash beside it."""
    write_text(path, json.dumps({"is": value, HASH: hash_bytes(json.dumps(value).encode())}))


def read_checked(path: Path) -> Any:
    """What `write_checked` wrote; None where the file is missing or damaged in any way."""
    try:
        entry = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get(HASH) != hash_bytes(json.dumps(entry.get("is")).encode()):
        return None
    return entry["is"]
