"""The pictures that namex-patch draws at the end: of small checkpoints, never at the cost of the patched folder."""

import json
import sys
import time
from pathlib import Path

import pytest

from namex_hf import load_patched
from namex_hf.commands import patch, patch_screen
from namex_hf.commands import report as command
from namex_hf.errors import install
from namex_hf.files import PAGE, PICTURES
from tests.helpers.process import SERVER
from tests.helpers.toy_models import save_toy

pytest.importorskip("matplotlib", reason="pictures need the extra 'report'")

Said = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    """Small checkpoints are drawn again."""
    monkeypatch.setattr(patch_screen, "DRAWN_BYTES", patch_screen.SCORED_BYTES)
    monkeypatch.setattr(patch_screen, "SCORED_TOKENS", 128)
    monkeypatch.setattr("namex_hf.report.pictures.picture.DOTS", 36)  # no test here looks at them


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with a tokenizer; not to be changed."""
    return save_toy(tmp_path_factory.mktemp("speaking") / "model", tokenizer=True)


def ran(*arguments: object) -> int:
    return patch.main([str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Contents and times."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_they_are_drawn_with_the_perplexity_and_linked_by_the_card(speaking: Path, tmp_path: Path, capsys: Said):
    out = tmp_path / "out"
    assert ran(speaking, "--out", out) == 0
    assert f"page: {out}/namex/pictures/report.html" in capsys.readouterr().err
    page, card = (out / "namex/pictures" / "report.html").read_text(), (out / "README.md").read_text()
    after = json.loads((out / "namex/report.json").read_text())["perplexity"]["mean"]["after"]
    assert f"{after:.2f}" in page
    assert f"{after:.2f}" in card
    names = {path.stem for path in (out / "namex/pictures").glob("*.png")}
    assert names >= {"1-similarity", "2-weights", "3-walk", "4-utilities", "5-stability", "6-usage"}
    assert all(f"](namex/pictures/{name}.png)" in card for name in names)
    assert not list(out.rglob("*.part"))

    before = files(out)
    assert ran(speaking, "--out", out) == 0
    assert "is complete" in capsys.readouterr().err
    assert files(out) == before


def test_a_quiet_run_draws_none(speaking: Path, tmp_path: Path):
    assert ran(speaking, "--out", tmp_path / "out", "--quiet") == 0
    assert not (tmp_path / "out" / "namex/pictures").exists()
    assert "namex/pictures/" not in (tmp_path / "out" / "README.md").read_text()


def test_those_of_a_large_checkpoint_are_a_step_of_their_own(
    speaking: Path, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(patch_screen, "DRAWN_BYTES", 1 << 10)
    assert ran(speaking, "--out", tmp_path / "out") == 0
    assert f"pictures: namex-report {tmp_path}/out\n" in capsys.readouterr().err
    assert not (tmp_path / "out" / "namex/pictures").exists()


def test_without_matplotlib_the_extra_is_named(
    toy: Path, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "namex_hf.report.pictures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ran(toy, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert f"no pictures: they need the extra 'report': {install('report')}\n" in said
    page = (tmp_path / "out" / PICTURES / PAGE).read_text()
    assert "<p>No pictures: they need the extra 'report'.</p>" in page
    assert "<h2>Layers</h2>" in page
    assert ran(toy, "--out", tmp_path / "quiet", "--quiet") == 0
    assert {*files(tmp_path / "out")} == {*files(tmp_path / "quiet"), f"{PICTURES}/{PAGE}"}


def test_a_broken_tokenizer_costs_the_pictures_only(copied: Path, tmp_path: Path, capsys: Said):
    (copied / "tokenizer.json").write_text("{]")
    (copied / "tokenizer_config.json").write_text("[")
    assert ran(copied, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "no pictures: " in said
    assert "has no tokenizer that transformers can open" in said
    assert "Traceback" not in said
    load_patched(tmp_path / "out")


def test_an_error_that_nobody_foresaw_costs_the_pictures_only(tmp_path: Path, capsys: Said):
    """Heads of attention that do not go together: the class is built, and patching asks for none."""
    model = save_toy(tmp_path / "model", tokenizer=True, num_attention_heads=4, num_key_value_heads=3)
    assert ran(model, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "no pictures: RuntimeError: " in said
    assert "Traceback" not in said
    assert (tmp_path / "out" / "config.json").is_file()


def test_killed_while_drawing(toy: Path, tmp_path: Path, capsys: Said):
    """The model is whole, its card links nothing that is not there, and ``namex-report`` draws what is missing."""
    out = tmp_path / "out"
    process = SERVER.Process(target=patch.main, args=([str(toy), "--out", str(out)],))
    process.start()
    while process.is_alive() and not list(out.glob("namex/pictures/*")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9
    assert not (out / "namex/pictures" / "report.html").exists()
    assert not (out / ".namex").exists()
    load_patched(out)
    assert "namex/pictures/" not in (out / "README.md").read_text()
    assert ran(toy, "--out", out) == 0
    assert "is complete" in capsys.readouterr().err
    assert command.main([str(out), "--quiet"]) == 0
    assert (out / "namex/pictures" / "report.html").is_file()
    assert not list(out.rglob("*.part"))
