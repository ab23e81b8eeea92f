"""An environment that has the wheel of this repository and what it requires, and no package of an extra."""

import os
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def required(requirements: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Installed distributions by name: those that the requirements ask for, and what these require in their turn."""
    found: dict[str, metadata.Distribution] = {}
    todo = [Requirement(text) for text in requirements]
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # such as CUDA packages, beside a torch without CUDA
            continue
        todo += map(Requirement, found[name].requires or ())
    return found


def tops(distribution: metadata.Distribution) -> Iterator[str]:
    """Names of the files and folders of a distribution in ``site-packages``."""
    names = {file.parts[0] for file in distribution.files or ()}
    yield from sorted(name for name in names if name not in ("..", "__pycache__"))


def of_extras_alone() -> set[str]:
    """Names of the packages that an extra for users brings and the package itself does not require."""
    extras = {name: texts for name, texts in PROJECT["optional-dependencies"].items() if name not in ("all", "dev")}
    named = {canonicalize_name(Requirement(text).name) for texts in extras.values() for text in texts}
    return named - required(PROJECT["dependencies"]).keys()


def build(folder: Path) -> Path:
    """The wheel, without a network."""
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    pip("wheel", str(ROOT), *offline, "--wheel-dir", str(folder))
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment_with(wheel: Path, folder: Path) -> Path:
    """A virtual environment with the wheel; packages that it requires are links to those of this environment."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in required(PROJECT["dependencies"]).values():
        for name in tops(distribution):
            target = Path(str(distribution.locate_file(name)))
            if target.exists() and not (site / name).exists():
                (site / name).symlink_to(target)
    pip("--python", str(python), "install", str(wheel), "--no-deps", "--no-index")
    return folder


def pip(*arguments: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
