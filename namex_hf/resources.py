"""What is delivered beside the code: models and texts in the package, recipes of ``patches/``."""

from pathlib import Path

from .errors import RecipeError
from .printable import did_you_mean

HERE = Path(__file__).parent
PACKAGED = HERE / "packaged"


def packaged_models() -> list[str]:
    """Names of the models inside this package."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/config.json"))


def beside(name: str) -> Path:
    """A folder that a wheel has inside the package, and the repository (an editable install) beside it."""
    inside = HERE / name
    return inside if inside.is_dir() else HERE.parent / name


def packaged_recipes() -> dict[str, Path]:
    """Recipe files by name, which is the path below ``patches/`` without ``.yaml``."""
    folder = beside("patches")
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(found.items()))


def recipe_path(text: str, option: str = "--recipe") -> Path:
    """The file of a recipe: a path, or the name of a packaged recipe where there is no such file or folder.

    Raises:
        RecipeError: neither a path nor a name, as far as that can be said without reading.
    """
    path, recipes = Path(text), packaged_recipes()
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    if text not in recipes:
        raise RecipeError(
            f"{option} {text}: no such file or folder; accepted: a YAML file, or a name that 'namex recipes' lists"
            + did_you_mean(text, recipes)
        )
    return recipes[text]
