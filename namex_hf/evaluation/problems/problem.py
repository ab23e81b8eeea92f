"""What a kind of problem is: a module with ``make`` and ``check``."""

import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ...defaults import PROBLEM_SEEDS

SEEDS = dict(zip(PROBLEM_SEEDS, (2, 1), strict=True))
"""``tables``: of figures that are published; ``choices``: of choices, such as that of the best recipe. One is even, the
other odd, so that they have no problem in common."""


@dataclass(frozen=True)
class Problem:
    """A text that the answer continues, or a chat."""

    prompt: str
    """The text; of a chat the user's last turn."""
    answer: str
    """A right answer."""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and content of each turn of a chat; the last is the user's."""


class Kind(Protocol):
    """A module of this folder."""

    NEW_TOKENS: int
    """The longest answer."""
    ONE_LINE: bool
    """Whether an answer ends with its line."""

    def make(self, seed: int, count: int) -> list[Problem]:
        """Different problems; fewer than `count` where the kind has no more. An even and an odd seed share none."""

    def check(self, answer: str, problem: Problem) -> bool:
        """Whether an answer is right. An answer is parsed at most, never run."""


def generated(one: Callable[[random.Random], Problem], seed: int, count: int) -> list[Problem]:
    """Problems of a generator that gives far more than `count` different ones."""
    draw, found = random.Random(seed), dict[Problem, None]()
    while len(found) < count:
        problem = one(draw)
        if is_of(problem, seed):
            found[problem] = None
    return list(found)


def selected(problems: Iterable[Problem], seed: int, count: int) -> list[Problem]:
    """Problems of a finite set, in random order."""
    half = [problem for problem in dict.fromkeys(problems) if is_of(problem, seed)]
    random.Random(seed).shuffle(half)
    return half[:count]


def is_of(problem: Problem, seed: int) -> bool:
    """Whether a problem belongs to this seed's half of all problems, the even or the odd."""
    return zlib.crc32(problem.prompt.encode()) % 2 == seed % 2


def first_line(answer: str) -> str:
    """Without blanks around it."""
    return answer.strip().partition("\n")[0].rstrip()
