"""Lines of random words, and the beginning of one of them: the rest of that line."""

import random
import re
from collections import Counter
from functools import cache

from ..perplexity import HELD_OUT
from .problem import Problem, first_line, generated

NEW_TOKENS, ONE_LINE = 32, True
LINES, WORDS, BEGUN = (2, 4, 8, 16, 28), 10, 4
"""Numbers of lines, the largest of some 470 tokens; words of a line; words of its beginning."""


@cache
def common_words() -> list[str]:
    """Of the held-out novel, in alphabetical order."""
    counts = Counter(re.findall(r"\b[a-z]{3,9}\b", (HELD_OUT / "prose.txt").read_text("utf-8")))
    return sorted(word for word, count in counts.items() if count > 3)


def make(seed: int, count: int) -> list[Problem]:
    """As of `Kind`."""
    return generated(_one, seed, count)


def _one(draw: random.Random) -> Problem:
    words = draw.sample(common_words(), draw.choice(LINES) * WORDS)
    lines = [words[start : start + WORDS] for start in range(0, len(words), WORDS)]
    line = draw.choice(lines)
    text = "\n".join(map(" ".join, lines))
    return Problem(f"{text}\n\n{' '.join(line[:BEGUN])}", " ".join(line[BEGUN:]))


def check(answer: str, problem: Problem) -> bool:
    """Whether the line goes on with the words of the problem, and with nothing else."""
    return first_line(answer).split() == problem.answer.split()
