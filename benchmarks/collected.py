"""Tests and assertions before and after a change: ``python benchmarks/collected.py . > before.json`` lists those of a
folder, ``python benchmarks/collected.py before.json after.json`` prints what is gone and what is new.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def collected(root: Path) -> list[str]:
    """Identifiers of all tests, as pytest collects them in ``root``."""
    options = ["--collect-only", "-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(root.resolve())}
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return sorted(line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line)


def checks(path: Path) -> dict[str, int]:
    """How many ``assert`` statements and calls of ``pytest.raises`` a file has."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    raises = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "pytest.raises"]
    return {"assert": sum(isinstance(n, ast.Assert) for n in nodes), "raises": len(raises)}


def listing(root: Path) -> dict[str, object]:
    files = {path.relative_to(root).as_posix(): checks(path) for path in sorted((root / "tests").rglob("*.py"))}
    return {"files": {name: found for name, found in files.items() if any(found.values())}, "tests": collected(root)}


def differences(before: dict, after: dict) -> Iterator[str]:
    """A line for everything that only one listing has, and for every file with another number of checks."""
    for word, one, other in (("gone", before, after), ("new", after, before)):
        for name in sorted({*one["tests"]} - {*other["tests"]}):
            yield f"{word}: {name}"
    for name in sorted({*before["files"], *after["files"]}):
        for kind in ("assert", "raises"):
            was, now = (side["files"].get(name, {}).get(kind, 0) for side in (before, after))
            if was != now:
                yield f"{'gone' if now < was else 'new'}: {abs(now - was)} {kind} in {name} ({was} before, {now} after)"
    totals = (sum(sum(found.values()) for found in side["files"].values()) for side in (before, after))
    yield "tests {} -> {}, checks {} -> {}".format(len(before["tests"]), len(after["tests"]), *totals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a root folder, or two listings")
    paths = parser.parse_args().paths
    if len(paths) == 2:
        print(*differences(*(json.loads(path.read_text()) for path in paths)), sep="\n")
    else:
        print(json.dumps(listing(paths[0]), indent=1))


if __name__ == "__main__":
    main()
