"""``namex-report`` on the packaged model: what it writes, and what it answers to bad input."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from namex_hf import patch_checkpoint
from namex_hf.commands import report as command
from namex_hf.recipe import Recipe
from namex_hf.report import write
from tests.helpers.checkpoints import forget_files
from tests.helpers.toy_models import save_toy

pytest.importorskip("matplotlib", reason="pictures need the extra 'report'")

PICTURES = ("1-similarity", "2-weights", "3-walk", "4-utilities", "5-stability")
FILES = {f"{name}.{form}" for name in PICTURES for form in ("png", "svg")} | {"report.html"}
USAGE = {"6-usage.png", "6-usage.svg"}
Said = pytest.CaptureFixture[str]


def ran(*arguments: object) -> int:
    return command.main([str(one) for one in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer dots: no test here looks at them."""
    monkeypatch.setattr("namex_hf.report.pictures.picture.DOTS", 36)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` by the default recipe; not to be changed."""
    folder = tmp_path_factory.mktemp("patched") / "tiny"
    patch_checkpoint("tiny", folder, Recipe())
    return folder


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "copied")


def test_a_page_and_every_picture_twice(tiny: Path, tmp_path: Path, capsys: Said):
    before = contents(tiny)
    assert ran(tiny, "--out", tmp_path / "deep" / "pictures") == 0
    assert {path.name for path in (tmp_path / "deep" / "pictures").iterdir()} == FILES | USAGE
    assert contents(tiny) == before
    assert capsys.readouterr().out.strip() == str(tmp_path / "deep" / "pictures" / "report.html")


@pytest.mark.parametrize("fields", [{}, {"merge": "soft", "method": "camex"}], ids=str)
def test_a_sparse_first_layer_has_its_pictures_too(tmp_path: Path, capsys: Said, fields: dict[str, str]):
    """Its games are played around the base that the walk begins with, which the folder does not store."""
    toy = save_toy(tmp_path / "toy", "deepseek", tokenizer=True)
    patch_checkpoint(toy, tmp_path / "out", Recipe(first_layer="sparse", **fields))
    capsys.readouterr()
    assert ran(tmp_path / "out", "--tokens", 0, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    drawn = {path.stem for path in (tmp_path / "out/namex/pictures").glob("*.png")}
    assert drawn >= ({"1-similarity"} if fields else set(PICTURES))


def test_the_folder_itself_takes_them_by_default_and_again(copied: Path, capsys: Said):
    before = contents(copied)
    assert ran(copied, "--tokens", 0, "--layer", 3, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    written = contents(copied / "namex/pictures")
    assert set(written) == FILES
    assert {name: data for name, data in contents(copied).items() if "pictures/" not in name} == before
    assert ran(copied, "--tokens", 0, "--layer", 3, "--quiet") == 0
    assert contents(copied / "namex/pictures") == written
    assert "Layer 3 (this layer was asked for)" in written["report.html"].decode()


def test_the_files_are_printed_as_json(tmp_path: Path, capsys: Said):
    patch_checkpoint(save_toy(tmp_path / "toy"), tmp_path / "out", Recipe(method="camex"))
    capsys.readouterr()
    assert ran(tmp_path / "out", "--tokens", 0, "--json", "--out", tmp_path / "drawn") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["page"] == str(tmp_path / "drawn" / "report.html")
    assert printed["pictures"] == sorted(map(str, (tmp_path / "drawn").glob("*.png"))) != []


def test_python_writes_the_same(tiny: Path, tmp_path: Path):
    page = write.write_pictures(tiny, tmp_path / "out", tokens=0)
    assert page == tmp_path / "out" / "report.html"
    assert {path.name for path in page.parent.iterdir()} == FILES


def test_without_a_tokenizer_no_text_is_read(copied: Path, capsys: Said):
    for file in copied.glob("tokenizer*"):
        file.unlink()
    forget_files(copied)
    assert ran(copied) == 0
    assert "no tokenizer in the folder: the experts answer to no text" in capsys.readouterr().err
    assert {path.name for path in (copied / "namex/pictures").iterdir()} == FILES


def test_a_large_folder_reads_text_if_it_is_told_to(
    copied: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(write, "SCORED_BYTES", 1 << 20)
    assert ran(copied) == 0
    assert "unless asked to: --tokens 4096" in capsys.readouterr().err
    assert not (copied / "namex/pictures" / "6-usage.png").exists()
    assert ran(copied, "--tokens", 1024, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "6-usage.png").exists()


def test_without_matplotlib_the_page_has_its_tables_and_the_extra_is_named(
    tiny: Path, tmp_path: Path, capsys: Said, monkeypatch: Any
):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "namex_hf.report.pictures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ran(tiny, "--out", tmp_path / "out") == 0
    assert "pip install 'namex-hf[report]'" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert "<h2>Layers</h2>" in (tmp_path / "out" / "report.html").read_text()


def changed_report(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def in_folder(folder: Path) -> None:
        path = folder / "namex/report.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return in_folder


def cut_statistics(folder: Path) -> None:
    (folder / "namex/statistics.safetensors").write_bytes(b"\xff" * 20)
    forget_files(folder)


def changed_statistics(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def in_folder(folder: Path) -> None:
        tensors = load_file(folder / "namex/statistics.safetensors")
        change(tensors)
        save_file(tensors, folder / "namex/statistics.safetensors")
        forget_files(folder)

    return in_folder


def without_recipe(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["namex"]
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no recipe": (without_recipe, "config.json has no recipe under 'namex'"),
    "no JSON": (lambda folder: (folder / "namex/report.json").write_text("{"), "report.json is no JSON"),
    "another report": (
        lambda folder: (folder / "namex/report.json").write_text('{"a": 1}'),
        "is no report of namex_hf",
    ),
    "a layer without games": (
        changed_report(lambda values: values["layers"][0].pop("games")),
        "is no report of namex_hf ('games')",
    ),
    "weights that are words": (
        changed_report(lambda values: values["layers"][0]["games"][0].update(weights="many")),
        "cannot be drawn, a record is damaged",
    ),
    "a layer without a record": (
        changed_report(lambda values: values["layers"].pop()),
        "has no record of layer 4",
    ),
    "other norms": (
        changed_report(lambda values: [game.update(norms=[1.0, 2.0]) for game in values["layers"][0]["games"]]),
        "layer 0 has norms [3, 2]; namex/statistics.safetensors has cosines [3, 16, 16]",
    ),
    "other statistics": (
        changed_statistics(lambda tensors: tensors.update(mean=torch.zeros(2))),
        "tensor mean; accepted: layers.L.cosines and layers.L.usage",
    ),
    "cut statistics": (cut_statistics, "truncated or no safetensors"),
    "cut weights": (lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_answered_in_one_line(copied: Path, capsys: Said, damage: str):
    break_it, wanted = DAMAGES[damage]
    break_it(copied)
    assert ran(copied, "--tokens", 0) == 2
    said = capsys.readouterr()
    assert said.err.startswith("namex-report: error: ")
    assert wanted in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (copied / "namex/pictures").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--layer", "5"], "--layer 5: accepted: a MoE layer of"),
        (["--tokens", "-1"], "--tokens -1: accepted: numbers from 0"),
        (["--tokens", "many"], "argument --tokens"),
    ],
)
def test_bad_arguments(tiny: Path, tmp_path: Path, capsys: Said, arguments: list[str], wanted: str):
    try:
        status = ran(tiny, "--out", tmp_path / "out", *arguments)
    except SystemExit as error:  # of the parser
        status = error.code
    assert status == 2
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_folder_of_ours(tmp_path: Path, capsys: Said):
    assert ran(tmp_path / "nowhere") == 2
    assert "nowhere/config.json cannot be read (" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_opened(copied: Path, capsys: Said):
    (copied / "tokenizer.json").write_text("{]")
    (copied / "tokenizer_config.json").write_text("[")
    assert ran(copied) == 2
    assert "has no tokenizer that transformers can open" in capsys.readouterr().err
    assert ran(copied, "--tokens", 0) == 0


def test_a_file_where_the_folder_should_be(tiny: Path, tmp_path: Path, capsys: Said):
    (tmp_path / "file").write_text("mine")
    assert ran(tiny, "--tokens", 0, "--out", tmp_path / "file") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
