"""Companions: the small files of a model folder beside its weights, such as tokenizer, generation defaults, licence."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import CONFIG, INDEX, SINGLE, write_bytes

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps all chat templates but the first."""
NAMES = re.compile(
    r"""
      (tokenizer_config|special_tokens_map|added_tokens|generation_config|chat_template|tekken)\.json
    | tokenizer(\.\d+)*\.json
    | chat_template[\w-]*\.jinja | additional_chat_templates/[^/]+\.jinja
    | tokenizer\.model(\.v\d+)? | (tokenizer|spiece|spm|spm_char|sentencepiece|sentencepiece\.bpe|tiktoken)\.model
    | (source|target)\.spm | [\w.-]+\.tiktoken
    | ([a-z]+[_-])?vocab([_-][a-z]+)?\.(json|txt|bpe) | merges\.txt | dict\.txt | bpe\.codes
    | (normalizer|byte_maps|emoji|word_shape|word_pronunciation)\.json
    """,
    re.VERBOSE,
)
"""Files of tokenizers and of generation, in lower case."""
LICENCES = re.compile(
    r"([a-z]+[_-])*(licen[cs]es?|copying|copyright|notices?|(acceptable_)?use_policy)([_-][\w-]*(\.\d+)*)?(\.(txt|md|rst))?"
)
"""Licences and notices, in lower case."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
LARGEST = 64 << 20


def is_companion(name: str) -> bool:
    """Whether a file of this name below the model's folder is a companion, in any case of letters. Code is not."""
    return NAMES.fullmatch(name.lower()) is not None or is_licence(name)


def is_licence(name: str) -> bool:
    return LICENCES.fullmatch(name.lower()) is not None


def companions(folder: Path) -> list[Path]:
    """The companions in a folder that are not too large.

    Raises:
        CheckpointError: a companion is a link that leaves the folder, or is not a regular file.
    """
    paths = [
        path
        for path in sorted([*folder.iterdir(), *_templates(folder)])
        if is_companion(path.relative_to(folder).as_posix()) and (path.is_symlink() or not path.is_dir())
    ]
    for path in paths:
        check_inside(path, folder)
    return [path for path in paths if path.stat().st_size <= LARGEST]


def _templates(folder: Path) -> Iterator[Path]:
    for place in folder.iterdir():
        if place.name.lower() == TEMPLATES and place.is_dir():
            yield from place.iterdir()


def check_inside(path: Path, folder: Path) -> None:
    """Raises:
    CheckpointError: `is_inside` is false.
    """
    if not is_inside(path, folder):
        kind = "a link that leaves the folder" if _leaves(path, folder) else "no regular file"
        raise CheckpointError(f"{path} is {kind}; needed: the file itself")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is a regular file in this folder, or in the Hub cache of the same model.

    The files of a Hub cache are links from ``snapshots/COMMIT/`` to the ``blobs/`` of the repository. A user's folder
    of such links is accepted too: its configuration or its weights identify the repository.
    """
    return path.is_file() and not _leaves(path, folder)


def _leaves(path: Path, folder: Path) -> bool:
    try:
        real = path.resolve()
        return not real.is_relative_to(folder.resolve()) and real.parent not in _blobs(folder)
    except (OSError, RuntimeError):  # a circle of links
        return True


def _blobs(folder: Path) -> Iterator[Path]:
    """The ``blobs/`` folder of the Hub cache that holds the model; nothing for a plain folder."""
    for name in (CONFIG, SINGLE, INDEX):
        blobs = (folder / name).resolve().parent
        if blobs.name == "blobs" and (blobs.parent / "snapshots").is_dir():
            yield blobs
            return


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def json_object(data: bytes) -> dict[str, Any]:
    """The parsed object; empty if `data` is not one: a broken small file is copied as it is, and stops no run."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def without_auto_map(data: bytes) -> bytes:
    """A tokenizer's configuration without ``auto_map``, which refers to code; where there is none, the same bytes."""
    values = json_object(data)
    if values.pop("auto_map", None) is None:
        return data
    return (json.dumps(values, indent=2) + "\n").encode()  # ASCII: half a surrogate pair has no UTF-8


def carry(folder: Path, out: Path) -> None:
    """Copy the companions to `out`, without the ``auto_map`` of a tokenizer configuration, which refers to code.

    Raises:
        CheckpointError: as `companions`.
    """
    for path in companions(folder):
        data = path.read_bytes()
        is_configuration = path.name.lower() == TOKENIZER_CONFIG
        write_bytes(out / path.relative_to(folder), without_auto_map(data) if is_configuration else data)
