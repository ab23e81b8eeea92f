"""What all models of a comparison are scored on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..defaults import SCORED_TOKENS, WORD_PROBLEMS
from ..errors import CalibrationError, UsageError
from ..files import LARGEST_TEXT, read_text
from .arithmetic import PROBLEMS, held_out_problems
from .perplexity import held_out_texts

WINDOW = 512  # tokens that are read together


@dataclass(frozen=True)
class Settings:
    """How to score, whatever the model."""

    texts: dict[str, str]
    """By domain."""
    tokens: int = SCORED_TOKENS
    """Scored of each text, from its beginning."""
    problems: int = WORD_PROBLEMS
    """Word problems answered."""
    device: str = "cpu"
    closeness: bool = False
    """Whether distributions are compared with the original's."""

    @property
    def identity(self) -> dict[str, Any]:
        """What makes scores comparable, plain: numbers and hashes."""
        return {
            "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()},
            "tokens": self.tokens,
            "window": WINDOW,
            "problems": self.problems,
            "problems_sha256": hashlib.sha256(PROBLEMS.read_bytes()).hexdigest(),
            "closeness": self.closeness,
            "device": self.device.split(":")[0],
            "dtype": "float32",
        }


def settings(files: Sequence[Path], tokens: int, problems: int, device: str, closeness: bool = False) -> Settings:
    """Check the numbers and read the texts.

    Args:
        files: a domain each, named by the file; none: the packaged held-out texts.

    Raises:
        UsageError: a number out of its range, or two texts of one name.
        CalibrationError: a text that cannot be read.
    """
    least, most = 2, len(held_out_problems())
    if tokens < least:
        raise UsageError(f"--tokens {tokens}: accepted: numbers from {least}")
    if not 0 <= problems <= most:
        raise UsageError(f"--problems {problems}: accepted: 0 to {most}")
    return Settings(_texts(files) if files else held_out_texts(), tokens, problems, device, closeness)


def _texts(files: Sequence[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in files:
        if file.stem in found:
            raise UsageError(f"--texts has two files of the name '{file.stem}'; accepted: one a domain")
        try:
            found[file.stem] = read_text(file, CalibrationError, LARGEST_TEXT)
        except CalibrationError as error:
            raise CalibrationError(f"--texts {error}; accepted: text files") from error
    return found
