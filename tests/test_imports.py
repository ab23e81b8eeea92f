"""Modules of the package import each other in one direction, from the commands down to the errors; no test imports a
test.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = (
    *("bottom", "recipe", "bargaining", "merging", "models", "families", "checkpoint", "calibration"),
    *("patching", "quantising", "evaluation", "report", "training", "hub", "commands", "namex_hf"),
)
"""A room imports those before it; ``bottom`` is every module that lies in no folder, ``namex_hf`` the public names."""
UPWARD = {("patching", "report")}
"""A patched folder has its card from the beginning."""

Modules = dict[str, Path]


def modules_of(package: Path) -> Modules:
    """The files of a package by the name of their module; folders without code of ours are left out."""
    files = [path for path in package.rglob("*.py") if (path.parent / "__init__.py").is_file()]
    names = (".".join(path.relative_to(package.parent).with_suffix("").parts) for path in files)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files, strict=True)}


def imports_of(name: str, modules: Modules) -> set[str]:
    """Modules of the package that a module imports, at its top or in a function."""
    path, found = modules[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {inner if (inner := f"{source}.{alias.name}") in modules else source for alias in node.names}
    return found & modules.keys() - {name}


def room(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__main__":
        return "namex_hf"
    return parts[1] if parts[1] in ROOMS or len(parts) > 2 else "bottom"


def test_a_circle_is_found(tmp_path: Path):
    package = tmp_path / "package"
    package.mkdir()
    for name, text in {"__init__": "", "a": "from . import b", "b": "def f():\n    from .a import g"}.items():
        (package / f"{name}.py").write_text(text)
    modules = modules_of(package)
    found = {name: imports_of(name, modules) for name in modules}
    assert found == {"package": set(), "package.a": {"package.b"}, "package.b": {"package.a"}}


def test_no_circle_and_no_import_upward():
    modules = modules_of(ROOT / "namex_hf")
    found = {name: imports_of(name, modules) for name in modules}
    assert "namex_hf.checkpoint.source" in found["namex_hf.checkpoint.resolve"]
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error
    upward = {
        (room(name), room(other)): (name, other)
        for name, others in found.items()
        for other in others
        if ROOMS.index(room(name)) < ROOMS.index(room(other))
    }
    assert upward.keys() == UPWARD, upward


def sources_of(path: Path) -> set[str]:
    """Modules that a file imports from, at its top or in a function."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return plain | {f"{'.' * node.level}{node.module or ''}.{alias.name}" for node in froms for alias in node.names}


def test_no_test_imports_a_test():
    """What tests share lies in `tests/helpers/`, and is imported from there by its whole name."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    helpers = [path for path in files if path.parent.name == "helpers"]
    assert {path.stem for path in helpers} >= {"checkpoints", "reference", "toy_models"}
    others = [path for path in files if path not in helpers]
    assert [path for path in others if not path.name.startswith(("test_", "conftest"))] == []
    names = {path.stem for path in files}
    for path in files:
        for source in sources_of(path):
            is_ours = source.startswith(("tests.", ".")) or source.split(".")[0] in names
            assert not is_ours or source.startswith("tests.helpers."), f"{path}: {source}"
