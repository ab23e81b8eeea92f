"""Word problems in the form of GSM8K, with operands that no training text of the packaged models has."""

import random

from ..arithmetic import asked, final_number
from .problem import Problem, generated
from .templates import problems

NEW_TOKENS, ONE_LINE = 110, False


def make(seed: int, count: int) -> list[Problem]:
    """As of `Kind`."""
    return generated(_one, seed, count)


def _one(draw: random.Random) -> Problem:
    question, answer = next(problems(1, draw.getrandbits(64), held_out=True))
    return Problem(asked(question), answer)


def check(answer: str, problem: Problem) -> bool:
    """Whether the number after ``####`` is right."""
    return final_number(answer) == final_number(problem.answer)
