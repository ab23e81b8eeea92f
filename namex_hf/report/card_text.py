"""Foreign words on a card: what a checkpoint calls itself must neither break a table nor become markup."""

import re
import unicodedata
from collections.abc import Iterable

KEPT = frozenset(" /.,-+±()'")
"""Marks that mean nothing inside a line of Markdown, a table or HTML."""


def one_line(text: object) -> str:
    """Without line breaks, control characters and what turns the direction of writing; white space runs become one."""
    seen = (" " if one.isspace() else one for one in str(text))
    return " ".join("".join(one for one in seen if unicodedata.category(one)[0] != "C").split())


def plain(text: object) -> str:
    """Text that reads as it is inside a line of Markdown, in a table too: every other mark as a numeric entity.

    A link that GitHub's dialect makes of bare ``www.`` is broken as well; those of ``http:`` and ``@`` lose their mark.
    """
    safe = "".join(one if one.isalnum() or one in KEPT else f"&#{ord(one)};" for one in one_line(text))
    safe = re.sub(r"(?<=[^\W_])&#95;(?=[^\W_])", "_", safe)  # within a word it is no emphasis
    return re.sub(r"(?i)(www)\.", r"\1&#46;", safe)


def fenced(text: str, language: str) -> list[str]:
    """Lines of a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *text.strip("\n").split("\n"), fence]


def section(name: str, lines: Iterable[str]) -> str:
    """A part of a card that can be found again and replaced."""
    body = "\n".join(lines)
    begin, end = _marks(name)
    return f"{begin}\n{body}\n{end}" if body else f"{begin}{end}"


def put_section(card: str, name: str, lines: Iterable[str]) -> str:
    """The card with the part `name` replaced, or with the part at its end where it has none."""
    begin, end = _marks(name)
    new = section(name, lines)
    at, to = card.find(begin), card.find(end)
    if at == -1 or to < at:
        return f"{card.rstrip()}\n\n{new}\n"
    return card[:at] + new + card[to + len(end) :]


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- namex:{name} -->", f"<!-- /namex:{name} -->"
