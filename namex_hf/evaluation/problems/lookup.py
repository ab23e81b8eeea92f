"""A list of words and numbers, and one of the words: its number."""

import random

from .copying import common_words
from .problem import Problem, first_line, generated

NEW_TOKENS, ONE_LINE = 8, True
ENTRIES = (4, 8, 16, 32, 56)
"""Numbers of lines, the largest of some 470 tokens."""


def make(seed: int, count: int) -> list[Problem]:
    """As of `Kind`."""
    return generated(_one, seed, count)


def _one(draw: random.Random) -> Problem:
    words = draw.sample(common_words(), draw.choice(ENTRIES))
    numbers = draw.sample(range(100, 1000), len(words))
    place = draw.randrange(len(words))
    entries = "".join(f"{word}: {number}\n" for word, number in zip(words, numbers, strict=True))
    return Problem(f"{entries}\n{words[place]}:", str(numbers[place]))


def check(answer: str, problem: Problem) -> bool:
    """Whether the line is the number."""
    return first_line(answer) == problem.answer
