"""Chats of a set: the packaged ones, a file, or a data set of the Hub."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import CalibrationError
from ..files import LARGEST_TEXT, parse_json, read_text
from .hub_source import FORM, hub_rows, is_hub_name
from .records import turns_of

Turns = list[dict[str, str]]
"""Of a chat, each with a ``role`` and a ``content``."""
PACKAGED = Path(__file__).parents[1] / "packaged" / "chats" / "train.jsonl"
MOST = 100_000
"""Chats that are read of a data set."""


def read_chats(source: str, seed: int = 0) -> list[Turns]:
    """The chats of a set in which an assistant answers in words, each up to its last answer.

    Args:
        source: ``packaged``, a ``.jsonl`` file with a list of ``messages`` a line, or a Hub data set with such a
            column.
        seed: of the order in a Hub data set.

    Raises:
        CalibrationError: no such file or data set, or records of another form.
        MissingExtraError: a Hub data set without the library that reads it.
    """
    path = PACKAGED if source == "packaged" else Path(source)
    if path.is_file():
        lines = read_text(path, CalibrationError, LARGEST_TEXT).splitlines()
        records: Iterator[Any] = (
            parse_json(line, f"{path}, line {number}", CalibrationError)
            for number, line in enumerate(lines, 1)
            if line.strip()
        )
    elif is_hub_name(source) and not path.exists():
        records = islice(hub_rows(source, seed)[1], MOST)
    else:
        raise CalibrationError(
            f"chats {source}: accepted: packaged, a .jsonl file of 'messages', a Hub data set {FORM}"
        )
    return [chat for number, record in enumerate(records, 1) if (chat := _chat(record, f"{source}, record {number}"))]


def _chat(record: Any, where: str) -> Turns:
    turns = turns_of(record) if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        raise CalibrationError(f"{where}: accepted: a list of 'messages', each with a 'role' and a 'content' of text")
    if any(turn["content"] is None for turn in turns):  # it calls tools, whose results follow from the call
        return []
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns[: answers[-1] + 1 if answers else 0]]


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return False
    return "content" in turn and isinstance(turn["content"], str | None)
