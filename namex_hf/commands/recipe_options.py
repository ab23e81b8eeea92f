"""The fields of a recipe as options of a command."""

import argparse
import re

from ..recipe import FIELDS, Recipe, read_yaml
from ..resources import recipe_path
from .common import Parser

COMMON = ("keep", "merge", "method", "experts", "fit", "calibration_data", "routing", "disagreement", "device")
"""Fields that ``--help`` shows, each by the first sentence of its help; ``--help-all`` shows every one."""


def add_recipe_options(parser: Parser, several: bool = False) -> None:
    """One option a field.

    Args:
        several: every option takes one value or more, and says no default.
    """
    groups = (parser.add_argument_group("recipe"), parser.add_argument_group("more fields of the recipe"))
    for field in FIELDS.values():
        nargs = None if not several else 1 if field.name == "device" else "+"
        default = "" if several or field.default is None else f" (default: {str(field.default).lower()})"
        values = field.choices or (("false", "true") if field.kind is bool else ())
        metavar = "|".join(values) or field.kind.__name__.upper()
        groups[field.name not in COMMON].add_argument(
            f"--{field.name.replace('_', '-')}",
            nargs=nargs,
            metavar=metavar,
            help=field.help.replace("%", "%%") + default,
        )
        if field.name in COMMON:
            parser.brief[field.name] = re.split("[.;] ", field.help)[0] + default


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe file with the options over it.

    Raises:
        RecipeError: no such file or packaged recipe, or what `Recipe` refuses.
    """
    values = read_yaml(recipe_path(options.recipe)) if options.recipe else {}
    for field in FIELDS.values():
        text = getattr(options, field.name)
        if text is not None:
            values[field.name] = field.parse(text)
    return Recipe.from_dict(values)
