"""Names of the files of a model folder, what tells a file from another, and how files are written and read.

What this package adds to a model lies in a folder of its own, ``namex/``, so that a program which opens every
``*.safetensors`` file of a model folder meets the model alone. Releases before 0.2.0 put it beside the weights:
`found` reads both places.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from .errors import CheckpointError, NamexError

CONFIG, CARD, SINGLE, INDEX = "config.json", "README.md", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
OURS = "namex"
"""The folder of all that this package adds."""
RECIPE, REPORT, SCORES = f"{OURS}/recipe.yaml", f"{OURS}/report.json", f"{OURS}/scores.json"
STATISTICS, PICTURES, PAGE = f"{OURS}/statistics.safetensors", f"{OURS}/pictures", "report.html"
MOMENTS = "moments.json"
"""In a folder of moments, what they depend on."""
BEFORE_0_2 = {
    RECIPE: "namex_recipe.yaml",
    REPORT: "namex_report.json",
    SCORES: "namex_scores.json",
    STATISTICS: "namex_statistics.safetensors",
    PICTURES: "namex_report",
}
"""Where releases before 0.2.0 put the same."""


def locate(folder: Path, name: str) -> Path:
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
    with open_regular(path) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def write_checked(path: Path, value: Any) -> None:
    """Write a plain value as JSON, with its hash beside it."""
    write_text(path, json.dumps({"is": value, HASH: hash_bytes(json.dumps(value).encode())}))


def read_checked(path: Path) -> Any:
    """What `write_checked` wrote; None where the file is missing or damaged in any way."""
    try:
        entry = read_json(path)
    except CheckpointError:
        return None
    if entry.get(HASH) != hash_bytes(json.dumps(entry.get("is")).encode()):
        return None
    return entry["is"]


# Reading what came from outside: regular files only, and of these no more than the limits below.

LARGEST = 64 << 20
"""Bytes of a small file (JSON, a card), and of a line of a large one."""
LARGEST_TEXT = 256 << 20
"""Bytes of a text that is read whole."""
LARGEST_RECIPE = 64 << 10
"""Bytes of a YAML file of fields."""
DEEPEST = 100
"""Lists and mappings inside each other."""
KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: os.strerror(errno.EISDIR)}

Kind = type[NamexError]


def open_regular(path: Path, raises: Kind = CheckpointError) -> BinaryIO:
    """A regular file, opened to read its bytes. What would keep its reader waiting is never waited for.

    Raises:
        NamexError: of the kind ``raises``: it cannot be opened, or is a folder, FIFO, socket or device.
    """
    try:
        # Without O_NONBLOCK a FIFO that nobody writes to is never opened.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # a ValueError: a NUL in its name
        if isinstance(error, OSError) and error.errno == errno.ENXIO:
            raise raises(f"{path} cannot be read (a socket or a device); accepted: a regular file") from error
        raise raises(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        found = KINDS.get(stat.S_IFMT(mode), "a device")
        raise raises(f"{path} cannot be read ({found}); accepted: a regular file")
    return os.fdopen(number, "rb")


def read_bytes(path: Path, raises: Kind = CheckpointError, largest: int = LARGEST) -> bytes:
    """The content of a regular file.

    Raises:
        NamexError: of the kind ``raises``: as of `open_regular`, or it has more than ``largest`` bytes.
    """
    with open_regular(path, raises) as file:
        try:
            data = file.read(largest + 1)
        except OSError as error:
            raise raises(f"{path} cannot be read ({error.strerror})") from error
        if len(data) > largest:
            size = max(os.fstat(file.fileno()).st_size, len(data))
            raise raises(f"{path} has {size:,} bytes; accepted: up to {largest:,}")
    return data


def read_text(path: Path, raises: Kind = CheckpointError, largest: int = LARGEST) -> str:
    """`read_bytes` as UTF-8; a mark of byte order is left out."""
    return decoded(read_bytes(path, raises, largest), f"{path}", raises)


def decoded(data: bytes, where: str, raises: Kind) -> str:
    """UTF-8 as text.

    Raises:
        NamexError: of the kind ``raises``, naming ``where``: it is something else.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise raises(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def bounded_lines(file: BinaryIO, where: object, raises: Kind) -> Iterator[bytes]:
    """The lines of an open file, each with its end.

    Raises:
        NamexError: of the kind ``raises``: a line has more than `LARGEST` bytes.
    """
    number = 0
    while line := file.readline(LARGEST + 1):
        number += 1
        if len(line) > LARGEST:
            raise raises(f"{where}, line {number} has more than {LARGEST:,} bytes; accepted: lines up to that")
        yield line


def read_json(path: Path, raises: Kind = CheckpointError) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        NamexError: of the kind ``raises``: as of `read_bytes` and `parse_json`, or it holds something else.
    """
    values = parse_json(read_bytes(path, raises), str(path), raises)
    if not isinstance(values, dict):
        raise raises(f"{path} holds {type(values).__name__}; a JSON object is needed")
    return values


def parse_json(text: str | bytes, where: str, raises: Kind = CheckpointError) -> Any:
    """What a JSON text holds.

    Raises:
        NamexError: of the kind ``raises``, naming ``where``: it is no JSON, has a key twice, or is nested deeper than
            `DEEPEST`.
    """
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise raises(f"{where} is no JSON: nested deeper than {DEEPEST} lists and objects") from error
    except ValueError as error:
        raise raises(f"{where} is no JSON: {error}") from error
    braces, brackets = ("{", "[") if isinstance(text, str) else (b"{", b"[")
    if text.count(braces) + text.count(brackets) > DEEPEST and _depth(values) > DEEPEST:  # type: ignore[arg-type]
        raise raises(f"{where} is nested deeper than {DEEPEST} lists and objects")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; Python's own reader takes the last of several values of one key."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _depth(values: Any) -> int:
    """Of lists and mappings inside each other; what Python runs for each of them recurses."""
    depth, level = 0, [values]
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def check_name(path: Path, raises: Kind) -> None:
    """Whether a path can be a folder's or file's that this package reads or writes.

    Raises:
        NamexError: of the kind ``raises``: a NUL in it, no UTF-8, too long, or a circle of links.
    """
    try:
        os.fspath(path).encode()
        path.stat()
    except UnicodeEncodeError as error:
        raise raises(f"{path}: the name is not UTF-8; accepted: another name") from error
    except ValueError as error:
        raise raises(f"{path}: the name has a NUL in it; accepted: another name") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise raises(f"{path}: {error.strerror}; accepted: another name") from error


def size_text(count: int) -> str:
    """Bytes for a reader, such as ``1.25 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError
