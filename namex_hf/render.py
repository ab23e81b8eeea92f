"""Text out of the templates in ``namex_hf/templates``: cards, reports and pages."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("namex_hf"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def rendered(template: str, **values: Any) -> str:
    """A template with its values. In HTML everything is escaped but what is `Markup`.

    Args:
        template: name of the file, without ``.jinja``.
    """
    return _environment().get_template(f"{template}.jinja").render(values)
