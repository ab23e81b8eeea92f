"""The peak is that of what ran since it was forgotten."""

from pathlib import Path

import pytest
import torch

from namex_hf.evaluation import memory
from namex_hf.evaluation.memory import forget_peak, peak_bytes


@pytest.mark.skipif(not memory.CLEAR.is_file(), reason="only Linux counts anew")
def test_what_was_freed_before_does_not_count():
    torch.ones(200 << 20, dtype=torch.uint8)
    before = peak_bytes("cpu")
    assert forget_peak("cpu")
    start = peak_bytes("cpu")
    assert before - start > 150 << 20
    held = torch.ones(100 << 20, dtype=torch.uint8)
    assert 90 << 20 < peak_bytes("cpu") - start < 150 << 20
    assert len(held)


def test_a_system_that_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "no" / "clear")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert forget_peak("cpu") is False
    assert peak_bytes("cpu") is None
