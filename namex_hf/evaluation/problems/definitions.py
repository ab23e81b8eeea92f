"""A definition of the held-out part of the packaged dictionary: which word is it?"""

import re
from collections.abc import Iterator

from ..perplexity import HELD_OUT
from .problem import Problem, first_line, selected

NEW_TOKENS, ONE_LINE = 16, True
EXAMPLES = (
    ("a meal eaten in the evening", "supper"),
    ("to fall in drops of water", "rain"),
    ("made thin by use", "worn"),
)
ENTRY = re.compile(r"(?P<words>[^()]+) \(\w+\): (?P<definition>[^;]+)")


def make(seed: int, count: int) -> list[Problem]:
    """As of `Kind`; the set is finite."""
    return selected(_all(), seed, count)


def _all() -> Iterator[Problem]:
    for entry in (HELD_OUT / "dictionary.txt").read_text("utf-8").split("\n\n"):
        match = ENTRY.match(entry.strip())
        if match and not any(word in match["definition"] for word in match["words"].split(", ")):
            shown = [*(f"Definition: {what}\nWord: {word}\n\n" for what, word in EXAMPLES)]
            yield Problem("".join(shown) + f"Definition: {match['definition'].strip()}\nWord:", match["words"])


def check(answer: str, problem: Problem) -> bool:
    """Whether the first line is a word of the entry, or several, whatever their case."""
    return {*first_line(answer).rstrip(".").lower().split(", ")} <= {*problem.answer.lower().split(", ")}
