"""The script as a user calls it, in this process."""

import sys
from pathlib import Path

import pytest

from tests.helpers.commands import Answer, Command
from tests.helpers.zero_shot import SCRIPT, module_of


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
