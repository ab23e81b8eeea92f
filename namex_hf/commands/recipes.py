"""``namex recipes``: the recipes that come with the package."""

import argparse
from collections.abc import Sequence

from ..errors import RecipeError
from ..files import LARGEST_RECIPE, read_text
from ..recipe import read_yaml
from ..resources import packaged_recipes
from .common import Parser, command_parser, print_json, run


def main(arguments: Sequence[str] | None = None, prog: str = "namex-recipes") -> int:
    """Entry point of ``namex recipes``."""
    return run(parser_of(prog), arguments, _recipes)


def parser_of(prog: str = "namex recipes") -> Parser:
    parser = command_parser(
        prog,
        "List the recipes that come with the package, a line each.\n"
        "'namex patch MODEL --out DIR --recipe NAME' takes one.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: of each its name, what it is, file and fields")
    return parser


def _recipes(options: argparse.Namespace) -> int:
    recipes = packaged_recipes()
    titles = {name: read_text(path, RecipeError, LARGEST_RECIPE).partition("\n")[0] for name, path in recipes.items()}
    titles = {name: line.removeprefix("# ") if line.startswith("#") else "" for name, line in titles.items()}
    if options.json:
        print_json(
            [
                {"name": name, "what": titles[name], "file": str(path), "fields": read_yaml(path)}
                for name, path in recipes.items()
            ]
        )
        return 0
    width = max(map(len, recipes), default=0)
    for name, title in titles.items():
        print(f"{name:<{width}}  {title}")
    return 0
