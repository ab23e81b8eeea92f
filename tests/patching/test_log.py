"""What a run writes to the package's log: decisions, and where an earlier run is continued."""

import logging
from pathlib import Path

import pytest

from namex_hf import Recipe, patch_checkpoint
from namex_hf.progress import ProgressEvent
from tests.helpers.toy_models import save_toy


class Stop(BaseException):
    """As a kill: nothing handles it."""


def test_groups_and_where_a_run_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def stop(event: ProgressEvent) -> None:
        if str(event) == "layer 1":
            raise Stop

    caplog.set_level(logging.INFO, "namex_hf")
    model = save_toy(tmp_path / "model")
    with pytest.raises(Stop):
        patch_checkpoint(model, tmp_path / "out", progress=stop)
    patch_checkpoint(model, tmp_path / "out")
    said = [record.getMessage() for record in caplog.records]
    assert "continues at layer 2" in said
    patch_checkpoint(model, tmp_path / "grouped", Recipe(merge="grouped", experts=2))
    (line, *_) = [record.getMessage() for record in caplog.records if "groups" in record.getMessage()]
    assert line.startswith("layer 0: 8 experts in 2 groups: [[")


def test_without_a_handler_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Python prints warnings of libraries where no handler is, the package's own excepted."""
    assert any(isinstance(one, logging.NullHandler) for one in logging.getLogger("namex_hf").handlers)
