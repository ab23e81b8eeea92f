"""Recipe files times values of fields: the cells of a comparison, all checked before anything is read."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..recipe import FIELDS, Recipe, read_yaml

SUFFIXES = (".yaml", ".yml")
DEFAULT = "default"
"""Label of the recipe that no file states."""


@dataclass(frozen=True)
class Cell:
    """One recipe of the grid."""

    name: str
    """Of its file, without the suffix."""
    varied: Mapping[str, Any]
    """Values of the fields for which several were given."""
    recipe: Recipe
    where: str
    """File and values, for complaints."""
    unused: tuple[str, ...] = ()
    """Fields with values that do not apply to it, and are left out."""

    @property
    def label(self) -> str:
        """Tells it from all other cells."""
        return ", ".join([self.name, *(f"{field} {value}" for field, value in self.varied.items())])

    @property
    def title(self) -> str:
        """Its label, without what has a column of its own."""
        return self._without("experts")

    @property
    def family(self) -> str:
        """What cells that differ in nothing but the seed have in common."""
        return self._without("seed")

    @property
    def line(self) -> str:
        """What cells that differ in the seed and in how many experts stay have in common."""
        return self._without("seed", "experts")

    @property
    def slug(self) -> str:
        """Its label as the name of a folder."""
        return slug(self.label)

    def _without(self, *left_out: str) -> str:
        shown = [f"{field} {value}" for field, value in self.varied.items() if field not in left_out]
        return ", ".join([self.name, *shown])


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", label)


def recipe_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Recipe files by label, which is the file's name without its suffix; of a folder all YAML files right in it.

    Raises:
        RecipeError: no such file or folder, a folder without recipes, or two files of one label.
    """
    by_label: dict[str, Path] = {}
    for path in paths:
        for file in _files(path):
            label = file.stem
            other = next((one for name, one in by_label.items() if slug(name) == slug(label)), None)
            if other is not None:
                raise RecipeError(f"--recipes {other} and {file} both have the label '{label}'; accepted: one of each")
            by_label[label] = file
    return by_label


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise RecipeError(f"--recipes {path} is a folder without recipes; accepted: *.yaml files in it")
        return files
    if not path.is_file():
        raise RecipeError(f"--recipes {path}: no such file or folder; accepted: YAML files and folders of them")
    return [path]


def grid(files: Mapping[str, Path], options: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Every recipe with every combination of values, which go over what the files say.

    The first field given varies slowest. A value is left out of a recipe that has no use for its field, where another
    recipe has one.

    Args:
        files: by label; none: the default recipe.
        options: by field, one value or more.

    Raises:
        RecipeError: a member that the rules of recipes refuse, naming its file, values and field.
    """
    given: dict[str, tuple[str, dict[str, Any]]] = {DEFAULT: ("the default recipe", {})}
    if files:
        given = {label: (str(path), read_yaml(path)) for label, path in files.items()}
    several = {field for field, values in options.items() if len(values) > 1}
    cells: dict[str, Cell] = {}
    refusals: dict[str, RecipeError] = {}
    for label, (place, stated) in given.items():
        for values in itertools.product(*options.values()):
            chosen = dict(zip(options, values, strict=True))
            stated_here = " ".join(f"{field}={value}" for field, value in chosen.items())
            where = f"{place} with {stated_here}" if stated_here else place
            try:
                recipe, unused = _applied(stated, chosen, options)
            except RecipeError as error:
                raise RecipeError(f"{where}: {error}") from error
            varied = {field: value for field, value in chosen.items() if field in several and field not in unused}
            cell = Cell(label, varied, recipe, where, tuple(unused))
            cells.setdefault(cell.label, cell)
            for field, reason in unused.items():
                refusals.setdefault(field, RecipeError(f"{where}: {reason}"))
    for field, refusal in refusals.items():
        if all(field in cell.unused for cell in cells.values()):
            raise refusal
    return list(cells.values())


def _applied(
    stated: Mapping[str, Any], chosen: Mapping[str, Any], options: Mapping[str, Sequence[Any]]
) -> tuple[Recipe, dict[str, RecipeError]]:
    """The recipe with the chosen values that it has a use for, and why it has none for the others.

    Raises:
        RecipeError: a refusal for another reason.
    """
    used, unused = dict(chosen), dict[str, RecipeError]()
    while refusal := _refusal(stated, used, options):
        field, unused[field] = refusal
        del used[field]
    return Recipe.from_dict({**stated, **used}), unused


def _refusal(
    stated: Mapping[str, Any], used: Mapping[str, Any], options: Mapping[str, Sequence[Any]]
) -> tuple[str, RecipeError] | None:
    """A field that the recipe has no use for, if there is one. A default is never refused: another value is tried."""
    for field, value in used.items():
        tried = next((one for one in (value, *options[field]) if one != FIELDS[field].default), value)
        try:
            Recipe.from_dict({**stated, **used, field: tried})
        except RecipeError as error:
            if error.fields[-1:] == (field,) and str(error).startswith(f"'{field}' "):
                return field, error
    return None


def field_options(namespace: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Values by field of a parsed command line, in the order of a recipe's fields; only what was given.

    Raises:
        RecipeError: a value of another kind.
    """
    specs = [spec for spec in FIELDS.values() if namespace.get(spec.name) is not None]
    return {spec.name: list(dict.fromkeys(map(spec.parse, namespace[spec.name]))) for spec in specs}
