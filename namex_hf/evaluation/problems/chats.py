"""Every turn of the assistant in the packaged held-out chats: repeat, sort, count, define, reckon."""

import json
from collections.abc import Iterator
from pathlib import Path

from ..arithmetic import final_number
from .problem import Problem, selected

NEW_TOKENS, ONE_LINE = 160, False
CHATS = Path(__file__).parents[2] / "packaged" / "chats" / "held_out.jsonl"


def make(seed: int, count: int) -> list[Problem]:
    """As of `Kind`; the set is finite."""
    return selected(_all(), seed, count)


def _all() -> Iterator[Problem]:
    for line in CHATS.read_text("utf-8").splitlines():
        turns = [(turn["role"], turn["content"]) for turn in json.loads(line)["messages"]]
        for place, (role, content) in enumerate(turns):
            if role == "assistant":
                yield Problem(turns[place - 1][1], content, tuple(turns[:place]))


def check(answer: str, problem: Problem) -> bool:
    """Whether the number after ``####`` is right or, without one, the words are equal but for case and full stop."""
    number = final_number(problem.answer)
    return final_number(answer) == number if number else _plain(answer) == _plain(problem.answer)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
