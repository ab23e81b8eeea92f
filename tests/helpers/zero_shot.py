"""`eval/zero_shot.py`: its files, its recipes, its results."""

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


SCRIPT = ROOT / "eval" / "zero_shot.py"


TASKS = ROOT / "eval" / "tasks"


def module_of(path: Path) -> Any:
    """A script that lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe(folder: Path, name: str, **fields: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(fields))
    return path


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / task / f"samples_{task}.jsonl").read_text().splitlines()]


def said(folder: Path, task: str) -> list[Any]:
    """What the model answered, item by item."""
    return [sample["resps"] for sample in samples(folder, task)]
