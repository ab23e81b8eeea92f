"""A line of held-out Python code, cut in its middle: the rest of it.

An answer is parsed, never run.
"""

import ast
import io
import random
import tokenize
import warnings
from collections.abc import Iterator

from ..perplexity import HELD_OUT
from .problem import Problem, selected

NEW_TOKENS, ONE_LINE = 48, True
CONTEXT = 30
"""Lines before it."""
LONGEST = 400
"""Characters of an answer that are parsed."""
STATEMENTS = (ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.Expr)


def make(seed: int, count: int) -> list[Problem]:
    """As of `Kind`; the set is finite."""
    return selected(_all(random.Random(0)), seed, count)


def _all(draw: random.Random) -> Iterator[Problem]:
    lines = (HELD_OUT / "code.txt").read_text("utf-8").splitlines()
    for number, line in enumerate(lines):
        places = _places(line.strip())
        if places:
            indent, place = len(line) - len(line.lstrip()), draw.choice(places)
            begun = line[: indent + place].rstrip()
            context = lines[max(number - CONTEXT, 0) : number]
            yield Problem("\n".join([*context, begun]), line[len(begun) :].rstrip())


def _places(line: str) -> list[int]:
    """Where a line of code can be cut: two tokens or more on each side, among those to come a name or a number."""
    tree = parsed(line)
    if tree is None or not isinstance(tree, STATEMENTS):
        return []
    if isinstance(tree, ast.Expr) and not isinstance(tree.value, ast.Call):
        return []  # a docstring, or words that parse
    tokens = [one for one in tokenize.generate_tokens(io.StringIO(line).readline) if one.string.strip()]
    worth = [one.type in (tokenize.NAME, tokenize.NUMBER) for one in tokens]
    return [tokens[at].start[1] for at in range(2, len(tokens) - 1) if any(worth[at:])]


def parsed(line: str) -> ast.stmt | None:
    """The one statement of a line; None where there is another number of them, or none that parses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about escapes in strings
            body = ast.parse(line[:LONGEST]).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return body[0] if len(body) == 1 else None


def check(answer: str, problem: Problem) -> bool:
    """Whether the completed line has the syntax tree of the original line: spaces, quotes and comments do not count."""
    begun = problem.prompt.rpartition("\n")[2].lstrip()
    completed, right = (parsed(begun + text.partition("\n")[0].rstrip()) for text in (answer, problem.answer))
    return completed is not None and right is not None and ast.dump(completed) == ast.dump(right)
