"""A checkpoint as found: configuration, shards, and every tensor's place. Nothing but headers is read here."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import ADAPTER, CONFIG, INDEX, SINGLE, check_name, read_json
from .companions import check_inside
from .header import TensorSpan, read_header
from .identity import Identity

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "consolidated*.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint folder whose headers have been read and hold together."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    spans: dict[str, TensorSpan]
    commit: str | None = None  # of the Hub repository it came from
    name: str = ""  # as the user gave it, without a local path
    elsewhere: tuple[str, ...] | None = None  # companions on the Hub, where only headers were fetched

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(span.size for span in self.spans.values())

    @cached_property
    def identity(self) -> Identity:
        """The files that a result depends on, as they were when this was asked for first."""
        return Identity(self.folder, self.config, self.shards, self.spans.values())

    def fingerprint(self) -> str:
        """SHA-256 over the configuration, the commit, and every tensor's name, dtype, shape and place."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        digest.update(str(self.commit).encode())
        for name, span in sorted(self.spans.items()):
            digest.update(f"{name} {span.dtype} {span.shape} {span.file.name} {span.begin}\n".encode())
        return digest.hexdigest()


def open_checkpoint(folder: Path, commit: str | None = None, name: str = "") -> Checkpoint:
    """Read configuration, index and headers of ``folder``.

    Raises:
        CheckpointError: anything missing, damaged, or contradicting itself.
    """
    check_name(folder, CheckpointError)
    refuse_adapter(str(folder), [ADAPTER] if os.path.lexists(folder / ADAPTER) else [])
    _check_links(folder, CONFIG, INDEX, SINGLE)
    config = read_json(folder / CONFIG)
    named = _shards_named(folder)
    spans: dict[str, TensorSpan] = {}
    files = sorted(set(named.values())) or [SINGLE]
    _check_links(folder, *files)
    for file in files:
        for tensor, span in read_header(folder / file).items():
            if named and named.get(tensor) != file:
                raise CheckpointError(f"{INDEX} places {tensor} in {named.get(tensor)}; it is in {file}")
            spans[tensor] = span
    missing = sorted(set(named) - set(spans))
    if missing:
        raise CheckpointError(f"{INDEX} places {missing[0]} in {named[missing[0]]}, which does not hold it")
    shards = tuple(sorted({span.file for span in spans.values()}))
    return Checkpoint(folder, config, shards, spans, commit, name or folder.name or folder.resolve().name)


def refuse_adapter(model: str, files: Iterable[str]) -> None:
    """Raises:
    CheckpointError: an adapter is among the files beside the weights, which transformers adds to them.
    """
    if ADAPTER in files:
        raise CheckpointError(
            f"{model} has an adapter beside its weights ({ADAPTER}), which no command here applies; merge it first "
            "(peft: merge_and_unload, then save_pretrained), or take the file away"
        )


def _check_links(folder: Path, *names: str) -> None:
    """Only links are looked at: what else is wrong with a file is told where it is read."""
    for name in names:
        if (folder / name).is_symlink():
            check_inside(folder / name, folder)


def _shards_named(folder: Path) -> dict[str, str]:
    """``weight_map`` of the index; empty for a checkpoint in one file."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).exists():
        raise CheckpointError(without_weights(folder.name, (path.name for path in folder.iterdir())))
    named = read_index(folder / INDEX)
    for tensor, file in named.items():
        if not (folder / file).is_file():
            raise CheckpointError(f"{file} is missing: {INDEX} places {tensor} in it")
    return named


def read_index(path: Path) -> dict[str, str]:
    """``weight_map`` of an index: tensor names to file names.

    Raises:
        CheckpointError: there is none, or it names a place that is no file of the same folder.
    """
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{INDEX}: 'weight_map' is {type(named).__name__}; needed: tensor names to file names")
    for tensor, file in named.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{INDEX}: {tensor} is placed in {file!r}; accepted: a file name inside the folder")
    return named


def without_weights(name: str, files: Iterable[str]) -> str:
    """What is said of a model that has no safetensors.

    Args:
        files: names of all its files.
    """
    pickles = sorted(file for file in files if any(fnmatch(file, pattern) for pattern in PICKLES))
    if pickles:
        return (
            f"{name} has its weights as pickle files only ({pickles[0]}); pickle files are never opened; "
            "accepted: safetensors"
        )
    return f"{name} has neither {SINGLE} nor {INDEX}"
