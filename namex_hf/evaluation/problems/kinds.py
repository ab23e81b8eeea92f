"""All kinds of problems, by name."""

from . import arithmetic, chats, code, copying, definitions, lookup, packaged, tools
from .problem import Kind

ALL: dict[str, Kind] = {
    "packaged": packaged,
    "arithmetic": arithmetic,
    "definitions": definitions,
    "code": code,
    "copying": copying,
    "lookup": lookup,
    "chats": chats,
    "tools": tools,
}
