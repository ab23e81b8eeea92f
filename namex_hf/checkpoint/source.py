"""An opened checkpoint: configuration, shards, and the place of every tensor. Of the weights only headers are read."""

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
    """A local checkpoint folder with consistent headers."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    spans: dict[str, TensorSpan]
    commit: str | None = None  # of its Hub repository
    name: str = ""  # from the user, without a local path
    elsewhere: tuple[str, ...] | None = None  # companions on the Hub, if only headers were fetched

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(span.size for span in self.spans.values())

    @cached_property
    def identity(self) -> Identity:
        """The files that a result depends on, in their state at the first access."""
        return Identity(self.folder, self.config, self.shards, self.spans.values())

    def fingerprint(self) -> str:
        """SHA-256 of the configuration, the commit, and every tensor's name, dtype, shape, file and offset."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        digest.update(str(self.commit).encode())
        for name, span in sorted(self.spans.items()):
            digest.update(f"{name} {span.dtype} {span.shape} {span.file.name} {span.begin}\n".encode())
        return digest.hexdigest()


def open_checkpoint(folder: Path, commit: str | None = None, name: str = "") -> Checkpoint:
    """Read configuration, index and headers of ``folder``.

    Raises:
        CheckpointError: a file is missing or damaged, or files contradict each other.
    """
    check_name(folder, CheckpointError)
    refuse_adapter(str(folder), [ADAPTER] if os.path.lexists(folder / ADAPTER) else [])
    _check_links(folder, CONFIG, INDEX, SINGLE)
    config = read_json(folder / CONFIG)
    file_of = _shards_named(folder)
    spans: dict[str, TensorSpan] = {}
    files = sorted(set(file_of.values())) or [SINGLE]
    _check_links(folder, *files)
    for file in files:
        for tensor, span in read_header(folder / file).items():
            if file_of and file_of.get(tensor) != file:
                raise CheckpointError(f"{INDEX} places {tensor} in {file_of.get(tensor)}; it is in {file}")
            spans[tensor] = span
    missing = sorted(set(file_of) - set(spans))
    if missing:
        raise CheckpointError(f"{INDEX} places {missing[0]} in {file_of[missing[0]]}, which does not hold it")
    shards = tuple(sorted({span.file for span in spans.values()}))
    return Checkpoint(folder, config, shards, spans, commit, name or folder.name or folder.resolve().name)


def refuse_adapter(model: str, files: Iterable[str]) -> None:
    """Raises:
    CheckpointError: an adapter is beside the weights; transformers would add it to them.
    """
    if ADAPTER in files:
        raise CheckpointError(
            f"{model} has an adapter beside its weights ({ADAPTER}), which no command here applies; merge it first "
            "(peft: merge_and_unload, then save_pretrained), or take the file away"
        )


def _check_links(folder: Path, *names: str) -> None:
    """Check links only: other errors of a file are raised where it is read."""
    for name in names:
        if (folder / name).is_symlink():
            check_inside(folder / name, folder)


def _shards_named(folder: Path) -> dict[str, str]:
    """``weight_map`` of the index; empty for a checkpoint in a single file."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).exists():
        raise CheckpointError(without_weights(folder.name, (path.name for path in folder.iterdir())))
    file_of = read_index(folder / INDEX)
    for tensor, file in file_of.items():
        if not (folder / file).is_file():
            raise CheckpointError(f"{file} is missing: {INDEX} places {tensor} in it")
    return file_of


def read_index(path: Path) -> dict[str, str]:
    """``weight_map`` of an index: tensor names to file names.

    Raises:
        CheckpointError: there is no ``weight_map``, or it has a value that is not a file name of the same folder.
    """
    file_of = read_json(path).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise CheckpointError(f"{INDEX}: 'weight_map' is {type(file_of).__name__}; needed: tensor names to file names")
    for tensor, file in file_of.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{INDEX}: {tensor} is placed in {file!r}; accepted: a file name inside the folder")
    return file_of


def without_weights(name: str, files: Iterable[str]) -> str:
    """The error message for a model without safetensors.

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
