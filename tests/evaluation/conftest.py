"""A toy model that is scored, short texts, and the zero-shot script as a user calls it, in this process."""

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from namex_hf.evaluation.perplexity import HELD_OUT
from namex_hf.evaluation.settings import Settings, settings
from tests.helpers.commands import Answer, Command
from tests.helpers.toy_models import save_toy, toy_tokenizer
from tests.helpers.zero_shot import SCRIPT, module_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("scored") / "model", tokenizer=True)


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.fixture
def tokenizer() -> Any:
    return toy_tokenizer()


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """A short text of a little more than two windows."""
    path = tmp_path / "texts" / "prose.txt"
    path.parent.mkdir()
    path.write_text((HELD_OUT / "prose.txt").read_text("utf-8")[:6000], "utf-8")
    return path


@pytest.fixture
def few(prose: Path) -> Settings:
    """Two windows of one text, no problems."""
    return settings([prose], tokens=1024, problems=0, device="cpu")


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
