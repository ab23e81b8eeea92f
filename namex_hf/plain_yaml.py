"""YAML as its readers mean it: what looks like a word is a word, and a number is written in decimal digits.

PyYAML follows YAML 1.1, by which 12:30:45 is 45045, 010 is 8, 1_0 is 10, and ``no`` is false; and 1e-2 is a text.
"""

import re
from collections import Counter
from typing import Any

import yaml

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


class PlainLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the scalars of `PLAIN`; a key that is there twice is an error."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (of PyYAML)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key.value, str)]  # others are refused by what follows
        if len(set(names)) != len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _form, _first in PLAIN:
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _first)
