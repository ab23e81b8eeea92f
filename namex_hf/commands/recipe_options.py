"""The fields of a recipe as options of a command."""

import argparse
import re
from dataclasses import dataclass, fields
from typing import Any

from ..errors import RecipeError
from ..recipe import Recipe, read_yaml
from ..resources import recipe_path
from .common import Parser

FLAGS = {"false": False, "true": True}
COMMON = ("merge", "method", "experts", "fit", "calibration_data", "routing", "disagreement", "device")
"""Fields that ``--help`` shows, each by the first sentence of its help; ``--help-all`` shows every one."""


@dataclass(frozen=True)
class RecipeField:
    """What an option needs of a field."""

    name: str
    kind: type
    choices: tuple[str, ...]
    """Empty where any value of the kind may be accepted."""
    default: Any
    help: str

    @property
    def metavar(self) -> str:
        choices = self.choices or (tuple(FLAGS) if self.kind is bool else ())
        return "|".join(choices) or self.kind.__name__.upper()

    @property
    def default_text(self) -> str:
        return "" if self.default is None else f" (default: {str(self.default).lower()})"


def recipe_fields() -> list[RecipeField]:
    """All fields, in their order."""
    return [
        RecipeField(
            spec.name,
            spec.metadata.get("kind", str),
            spec.metadata.get("choices", ()),
            spec.default,
            spec.metadata["help"].replace("%", "%%"),
        )
        for spec in fields(Recipe)
    ]


def add_recipe_options(parser: Parser, several: bool = False) -> None:
    """One option a field.

    Args:
        several: every option takes one value or more, and says no default.
    """
    groups = (parser.add_argument_group("recipe"), parser.add_argument_group("more fields of the recipe"))
    for field in recipe_fields():
        nargs = None if not several else 1 if field.name == "device" else "+"
        default = "" if several else field.default_text
        groups[field.name not in COMMON].add_argument(
            f"--{field.name.replace('_', '-')}", nargs=nargs, metavar=field.metavar, help=field.help + default
        )
        if field.name in COMMON:
            parser.brief[field.name] = re.split("[.;] ", field.help)[0] + default


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe file with the options over it.

    Raises:
        RecipeError: no such file or packaged recipe, or what `Recipe` refuses.
    """
    values = read_yaml(recipe_path(options.recipe)) if options.recipe else {}
    for field in recipe_fields():
        text = getattr(options, field.name)
        if text is not None:
            try:
                values[field.name] = FLAGS.get(text, text) if field.kind is bool else field.kind(text)
            except ValueError as error:
                raise RecipeError(
                    f"recipe field '{field.name}' is {text!r}; accepted: {field.kind.__name__}"
                ) from error
    return Recipe.from_dict(values)
