"""The script as a user calls it, in this process."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "eval" / "zero_shot.py"
TASKS = ROOT / "eval" / "tasks"


class Answer(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., Answer]


def module_of(path: Path) -> Any:
    """A script of ``eval/``, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def zero_shot(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """``zero_shot("--models", "tiny", ...)``."""
    module = module_of(SCRIPT)

    def command(*arguments: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["zero_shot.py", "--device", "cpu", *map(str, arguments)])
        capfd.readouterr()
        try:
            status = module.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Answer(status, *capfd.readouterr())

    return command


def recipe(folder: Path, name: str, **fields: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(fields))
    return path


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / task / f"samples_{task}.jsonl").read_text().splitlines()]


def said(folder: Path, task: str) -> list[Any]:
    """What the model answered, item by item."""
    return [sample["resps"] for sample in samples(folder, task)]
