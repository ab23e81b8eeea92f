from pathlib import Path

import pytest

from namex_hf.comparison.settings import Settings, settings
from namex_hf.scoring.perplexity import HELD_OUT


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
