"""A checkpoint as found: configuration, shards, and every tensor's place. Nothing but headers is read here."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import CONFIG, INDEX, SINGLE, check_name, read_json
from .header import TensorSpan, read_header

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

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(span.size for span in self.spans.values())

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
    config = read_json(folder / CONFIG)
    named = _shards_named(folder)
    spans: dict[str, TensorSpan] = {}
    for file in sorted(set(named.values())) or [SINGLE]:
        for tensor, span in read_header(folder / file).items():
            if named and named.get(tensor) != file:
                raise CheckpointError(f"{INDEX} places {tensor} in {named.get(tensor)}; it is in {file}")
            spans[tensor] = span
    missing = sorted(set(named) - set(spans))
    if missing:
        raise CheckpointError(f"{INDEX} places {missing[0]} in {named[missing[0]]}, which does not hold it")
    shards = tuple(sorted({span.file for span in spans.values()}))
    return Checkpoint(folder, config, shards, spans, commit, name or folder.name or folder.resolve().name)


def _shards_named(folder: Path) -> dict[str, str]:
    """``weight_map`` of the index; empty for a checkpoint in one file."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder.name} has its weights as pickle files only ({pickles[0]}), which are never opened; "
                "accepted: safetensors"
            )
        raise CheckpointError(f"{folder.name} has neither {SINGLE} nor {INDEX}")
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{INDEX}: 'weight_map' is {type(named).__name__}; needed: tensor names to file names")
    for tensor, file in named.items():
        # By name, never by resolved path: the files of a Hub cache are symlinks that point outside their folder.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{INDEX}: {tensor} is placed in {file!r}; accepted: a file name inside the folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{file} is missing: {INDEX} places {tensor} in it")
    return named
