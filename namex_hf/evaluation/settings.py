"""What all models of a comparison are scored on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..defaults import KINDS, PROBLEM_SEED, SCORED_TOKENS, WORD_PROBLEMS
from ..errors import CalibrationError, UsageError
from ..files import LARGEST_TEXT, read_text
from .arithmetic import PROBLEMS, held_out_problems
from .perplexity import held_out_texts
from .problems.kinds import ALL
from .problems.problem import SEEDS, Problem

WINDOW = 512  # tokens that are read together
MOST = 10_000  # problems of a kind
FIRST = 20  # by which it is told whether a kind makes the same problems


@dataclass(frozen=True)
class Settings:
    """How to score, whatever the model."""

    texts: dict[str, str]
    """By domain."""
    tokens: int = SCORED_TOKENS
    """Scored of each text, from its beginning."""
    problems: int = WORD_PROBLEMS
    """Of each kind."""
    device: str = "cpu"
    closeness: bool = False
    """Whether distributions are compared with the original's."""
    kinds: tuple[str, ...] = KINDS[:1]
    """Of problems."""
    problem_seed: str = PROBLEM_SEED
    """Of generated problems."""

    def made(self) -> dict[str, list[Problem]]:
        """The problems by kind; none of a kind that is not asked."""
        return dict(_made(self.kinds, self.problem_seed, self.problems))

    @property
    def identity(self) -> dict[str, Any]:
        """What makes scores comparable, plain: numbers and hashes."""
        first = _made(self.kinds, self.problem_seed, FIRST)
        return {
            "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()},
            "tokens": self.tokens,
            "window": WINDOW,
            "problems": self.problems,
            "problems_sha256": hashlib.sha256(PROBLEMS.read_bytes()).hexdigest(),
            "kinds": {kind: hashlib.sha256(repr(found).encode()).hexdigest() for kind, found in first.items()},
            "problem_seed": self.problem_seed,
            "closeness": self.closeness,
            "device": self.device.split(":")[0],
            "dtype": "float32",
        }


@cache
def _made(kinds: tuple[str, ...], seed: str, count: int) -> dict[str, list[Problem]]:
    return {kind: ALL[kind].make(SEEDS[seed], count) for kind in kinds if count}


def settings(
    files: Sequence[Path],
    tokens: int,
    problems: int,
    device: str,
    closeness: bool = False,
    kinds: Sequence[str] = KINDS[:1],
    problem_seed: str = PROBLEM_SEED,
) -> Settings:
    """Check the numbers and read the texts.

    Args:
        files: a domain each, named by the file; none: the packaged held-out texts.
        problems: of each kind; of a kind that has fewer, all.

    Raises:
        UsageError: a number out of its range, or two texts of one name.
        CalibrationError: a text that cannot be read.
    """
    kinds = tuple(dict.fromkeys(kinds))
    least, most = 2, len(held_out_problems()) if kinds == KINDS[:1] else MOST
    if tokens < least:
        raise UsageError(f"--tokens {tokens}: accepted: numbers from {least}")
    if not 0 <= problems <= most:
        more = f", with --kinds to {MOST}" if most < MOST else ""
        raise UsageError(f"--problems {problems}: accepted: 0 to {most}{more}")
    texts = _texts(files) if files else held_out_texts()
    return Settings(texts, tokens, problems, device, closeness, kinds, problem_seed)


def _texts(files: Sequence[Path]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for file in files:
        if file.stem in texts:
            raise UsageError(f"--texts has two files of the name '{file.stem}'; accepted: one a domain")
        try:
            texts[file.stem] = read_text(file, CalibrationError, LARGEST_TEXT)
        except CalibrationError as error:
            raise CalibrationError(f"--texts {error}; accepted: text files") from error
    return texts
