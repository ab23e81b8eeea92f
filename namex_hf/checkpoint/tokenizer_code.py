"""Code that a tokenizer brings along in its folder: found by name and carried as bytes, never imported."""

import ast
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from ..files import write_bytes
from ..printable import printable
from .companions import LARGEST, TOKENIZER_CONFIG, check_inside, has_tokenizer, json_object

CLASS = re.compile(r"([A-Za-z_]\w*)\.[A-Za-z_]\w*", re.ASCII)
"""A class in a file of the same folder; one of another repository is ``OWNER/NAME--module.Class``."""
LARGEST_CODE = 1 << 20


def tokenizer_code(folder: Path) -> list[Path]:
    """The files of code that a folder's tokenizer needs: those of `named_code` that are there and not too large.

    Empty where the file of a class that ``auto_map`` names is not among them.

    Raises:
        CheckpointError: one is a link that leaves the folder, or is not a regular file.
    """
    found = [name for name in named_code(folder) if _is_usable(folder / name, folder)]
    return [folder / name for name in found] if {*_files_of_classes(folder)} <= {*found} else []


def named_code(folder: Path) -> list[str]:
    """Names of the files of code, there or not: those of the classes that ``auto_map`` of the tokenizer's configuration
    names, and those that they import from beside them.

    Raises:
        CheckpointError: as `tokenizer_code`.
    """
    names = _files_of_classes(folder)
    for name in names:  # grows meanwhile: what is imported imports further
        names += [other for other in _imported(folder / name, folder) if other not in names]
    return names


def carry_code(folder: Path, out: Path) -> None:
    """Copy the code of `tokenizer_code` to `out`, and the tokenizer's configuration with its ``auto_map``.

    Raises:
        CheckpointError: as `tokenizer_code`.
    """
    if not (code := tokenizer_code(folder)):
        return
    data = (folder / TOKENIZER_CONFIG).read_bytes()
    values = json_object(data)
    if isinstance(values["auto_map"], dict) and len(values["auto_map"]) > 1:  # others name code that is not carried
        values["auto_map"] = {"AutoTokenizer": values["auto_map"]["AutoTokenizer"]}
        data = (json.dumps(values, indent=2) + "\n").encode()
    write_bytes(out / TOKENIZER_CONFIG, data)
    for path in code:
        write_bytes(out / path.name, path.read_bytes())


def code_line(folder: Path) -> str:
    """The line to print about `tokenizer_code`; empty where there is none."""
    names = ", ".join(path.name for path in tokenizer_code(folder))
    return printable(f"the tokenizer's code is carried over as it is, and was not run: {names}") if names else ""


def lack_of_tokenizer(folder: Path) -> str:
    """What a folder has in place of a tokenizer that may open without code of its own; empty where it has one."""
    if has_tokenizer(folder):
        return ""
    return "no tokenizer that opens without code of its own" if tokenizer_code(folder) else "no tokenizer"


def _files_of_classes(folder: Path) -> list[str]:
    """Files of the tokenizer's classes, slow and fast; empty where one is of another repository, or none is named."""
    path = folder / TOKENIZER_CONFIG
    stated: Any = json_object(path.read_bytes()).get("auto_map") if _is_usable(path, folder, LARGEST) else None
    if isinstance(stated, dict):
        stated = stated.get("AutoTokenizer")
    if not isinstance(stated, list) or len(stated) != 2:  # transformers reads no other form
        return []
    matches = [CLASS.fullmatch(str(one)) for one in stated if one is not None]
    return list(dict.fromkeys(f"{match[1]}.py" for match in matches if match)) if all(matches) else []


def _imported(path: Path, folder: Path) -> list[str]:
    """Files that a file of code names by ``from .name import``; empty for what is no Python of today."""
    if not _is_usable(path, folder):
        return []
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that mean nothing, and the like
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return list(dict.fromkeys(f"{module}.py" for module in modules if module and "." not in module))


def _is_usable(path: Path, folder: Path, largest: int = LARGEST_CODE) -> bool:
    if not os.path.lexists(path):
        return False
    check_inside(path, folder)
    return path.stat().st_size <= largest
