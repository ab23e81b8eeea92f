"""YAML as its readers mean it: what looks like a word is a word, and a number is written in decimal digits.

PyYAML follows YAML 1.1, by which 12:30:45 is 45045, 010 is 8, 1_0 is 10, and ``no`` is false; and 1e-2 is a text.
"""

import re
from collections import Counter
from typing import Any

import yaml

from .files import DEEPEST

PLAIN = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
"""By tag: what a plain scalar must match as a whole, and what it may begin with."""


def parse_yaml(text: str) -> Any:
    """What a YAML text of plain values holds.

    Raises:
        yaml.YAMLError: no YAML; a key that is there twice; aliases, of which a short text makes an endless one; nested
            deeper than `DEEPEST`; a whole number of more than 64 bits.
        ValueError: a date or a number that there is not.
    """
    try:
        return yaml.load(text, PlainLoader)
    except (AttributeError, TypeError, KeyError, IndexError, OverflowError) as error:  # of a value and its tag
        raise yaml.YAMLError(f"a value that its tag does not fit ({error})") from error


class PlainLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the scalars of `PLAIN`, and with the bounds of `parse_yaml`."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (of PyYAML)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not accepted")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"nested deeper than {DEEPEST}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key.value, str)]  # others are refused by what follows
        if len(set(names)) != len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def whole(self, node: Any) -> int:
        number = self.construct_yaml_int(node)
        if number.bit_length() > 64:
            raise yaml.YAMLError(f"a whole number of {number.bit_length()} bits; accepted: up to 64")
        return number


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.whole)
for _tag, _form, _first in PLAIN:
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _first)
