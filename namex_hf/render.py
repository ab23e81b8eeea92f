"""Text out of the templates in ``namex_hf/templates``: cards and pages."""

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("namex_hf"),
        autoescape=lambda name: name is not None and name.endswith((".html.jinja", ".svg.jinja")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["joined"] = _joined
    return made


def _joined(text: str) -> str:
    """One line a paragraph, or a line for each item that ``*`` begins."""
    return re.sub(r"\s*\n(?!\* )\s*", " ", text.strip()) + "\n"


def rendered(template: str, **values: Any) -> str:
    """A template with its values. In HTML and SVG everything is escaped unless it is marked as safe.

    Args:
        template: name of the file, without ``.jinja``.
    """
    return _environment().get_template(f"{template}.jinja").render(values)
