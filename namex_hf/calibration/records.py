"""What of a data set's record is its text: the columns that such sets usually have."""

import json
from collections.abc import Mapping
from typing import Any

PLAIN = ("text", "content")
CHATS = ("messages", "conversations")
PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("problem", "solution")),
    *(("instruction", "output"), ("instruction", "response")),
)
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""Of turns that have ``from`` and ``value``."""


def plain_of(fields: Mapping[str, Any]) -> str | None:
    """The text of a record that is no chat."""
    return next((fields[name] for name in PLAIN if isinstance(fields.get(name), str)), None)


def turns_of(fields: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a record that is a chat, calls of tools and their results included."""
    for name in CHATS:
        if isinstance(fields.get(name), list):
            return [_turn(turn) for turn in fields[name]]
    return None


def pair_of(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """A question and its answer."""
    for names in PAIRS:
        first, second = map(fields.get, names)
        if isinstance(first, str) and isinstance(second, str):
            return first, second
    return None


def tools_of(fields: Mapping[str, Any]) -> list[Any] | None:
    """The tools that a chat may call, for its template."""
    tools = fields.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return None
    return tools if isinstance(tools, list) and tools else None


def _turn(turn: Any) -> Any:
    """With a ``role`` and a ``content``, and without columns that are empty in this turn."""
    if not isinstance(turn, Mapping):
        return turn
    if isinstance(turn.get("from"), str) and "value" in turn:
        return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
    return {name: value for name, value in turn.items() if value is not None or name == "content"}
