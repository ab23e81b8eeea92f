"""The 200 packaged word problems, for every seed the same: those of all figures before there were other kinds."""

from ..arithmetic import asked, held_out_problems
from .arithmetic import NEW_TOKENS, ONE_LINE, check
from .problem import Problem


def make(seed: int, count: int) -> list[Problem]:
    """The first `count`."""
    return [Problem(asked(one["question"]), one["answer"]) for one in held_out_problems()[:count]]


__all__ = ["NEW_TOKENS", "ONE_LINE", "check", "make"]
