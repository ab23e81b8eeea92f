"""The small files of a model folder that go along with its weights: tokenizer, generation defaults, licence."""

import json
from pathlib import Path
from typing import Any

from ..files import write_text

PATTERNS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "*.tiktoken",
    "spiece.model",
    "LICENSE*",
    "NOTICE*",
)
LARGEST = 64 << 20


def companions(folder: Path) -> list[Path]:
    """Files to carry over, never code or pickles."""
    found = {path for pattern in PATTERNS for path in folder.glob(pattern)}
    return sorted(
        path
        for path in found
        if path.is_file() and path.suffix not in (".py", ".bin") and path.stat().st_size <= LARGEST
    )


def has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    )


def _json_object(data: bytes) -> dict[str, Any]:
    """Empty for what is none: a broken file of small use is carried as it is, not a reason to refuse the weights."""
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def carry(folder: Path, out: Path) -> None:
    """Copy the companions; a tokenizer configuration that points to code of others loses the pointer."""
    for path in companions(folder):
        data = path.read_bytes()
        if path.name == "tokenizer_config.json":
            values = _json_object(data)
            if values.pop("auto_map", None) is not None:
                write_text(out / path.name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
                continue
        part = out / (path.name + ".part")
        part.write_bytes(data)
        part.replace(out / path.name)
