"""Toy checkpoints and the commands, run in this process."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from namex_hf.commands import patch, patch_screen
from namex_hf.evaluation import perplexity, routing
from tests.helpers.toy_models import save_toy

Refused = Callable[..., str]


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint a family, without tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("toys")
    return {family: save_toy(folder / family, family) for family in ("qwen2_moe", "deepseek")}


@pytest.fixture
def toy(toys: dict[str, Path]) -> Path:
    return toys["qwen2_moe"]


@pytest.fixture
def copied(toys: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Qwen2-MoE toy that a test may damage."""
    return Path(shutil.copytree(toys["qwen2_moe"], tmp_path / "copied"))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint is too large for pictures at the end of its run, which take seconds; `test_pictures` draws."""
    monkeypatch.setattr(patch_screen, "DRAWN_BYTES", 0)


@pytest.fixture(autouse=True)
def beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads a held-out text beyond its first 8,192 tokens, and tokenizing all of it takes seconds."""
    texts = {name: text[:40_000] for name, text in perplexity.held_out_texts().items()}
    for reader in (perplexity, routing):
        monkeypatch.setattr(reader, "held_out_texts", lambda: texts)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run namex-patch on bad input and return its complaint, after checking what holds for every one."""

    def run(model: object, *flags: object, out: Path | None = None) -> str:
        before = set(tmp_path.rglob("*"))
        try:
            status = patch.main([str(model), "--out", str(out or tmp_path / "out"), *map(str, flags)])
        except SystemExit as ended:  # argparse's own complaints
            status = ended.code
        said = capsys.readouterr()
        assert status == 2
        assert said.out == ""
        assert said.err.startswith("namex-patch: error: ")
        assert said.err.count("\n") == 1, said.err
        assert set(tmp_path.rglob("*")) == before, "something was left"
        return said.err

    return run
