"""A finished folder is complete with every file that its report lists; else the same run makes it whole."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from namex_hf import Recipe, patch_checkpoint
from namex_hf.commands.push import main as push
from namex_hf.commands.report import main as draw
from namex_hf.errors import CheckpointError
from namex_hf.evaluation.candidates import resolve_model
from namex_hf.training.start import start_from
from tests.helpers.checkpoints import all_files
from tests.helpers.toy_models import save_toy

SHARD, ADDED = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = [
    SHARD,
    ADDED,
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "namex/recipe.yaml",
    "namex/statistics.safetensors",
    "modeling_namex_qwen2_moe.py",
]
DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("toy") / "toy", tokenizer=True)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    patch_checkpoint(source, out)
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def result(folder: Path) -> dict[str, bytes]:
    """All files but the report, whose times differ."""
    return {name: data for name, (data, _) in all_files(folder).items() if name != "namex/report.json"}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_the_same_run_makes_it_whole(source: Path, made: Path, folder: Path, name: str, damage: str) -> None:
    DAMAGE[damage](folder / name)
    patch_checkpoint(source, folder)
    assert result(folder) == result(made)


@pytest.mark.parametrize("name", [SHARD, ADDED, "tokenizer.json", "namex/statistics.safetensors"])
def test_a_flipped_bit_is_found_where_files_are_verified(source: Path, made: Path, folder: Path, name: str) -> None:
    flip(folder / name)
    before = all_files(folder)
    patch_checkpoint(source, folder)
    assert all_files(folder) == before
    patch_checkpoint(source, folder, verify=True)
    assert result(folder) == result(made)
    before = all_files(folder)
    patch_checkpoint(source, folder, verify=True)
    assert all_files(folder) == before


def test_another_recipe_is_refused_before_anything_is_repaired(source: Path, folder: Path) -> None:
    (folder / SHARD).unlink()
    before = all_files(folder)
    with pytest.raises(Exception, match="another recipe"):
        patch_checkpoint(source, folder, Recipe(gamma=0.5))
    assert all_files(folder) == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_other_commands_refuse_it(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line that names the file."""
    DAMAGE[damage](folder / ADDED)
    before = all_files(folder)
    for open_folder in (start_from, resolve_model):
        with pytest.raises(CheckpointError, match=ADDED):
            open_folder(str(folder))
    for command in ([push, folder, "--repo", "a/b", "--dry-run"], [draw, folder]):
        assert command[0](list(map(str, command[1:]))) == 2
        said = capsys.readouterr().err
        assert ADDED in said
        assert said.count("\n") == 1
    assert all_files(folder) == before


def test_other_commands_refuse_a_folder_without_its_template_or_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    for open_folder in (start_from, resolve_model):
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is missing; the command that made"):
            open_folder(str(folder))


def test_settings_that_a_user_has_edited_are_no_damage_elsewhere(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    assert start_from(str(folder)).patched


def test_push_verifies(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "--repo", "a/b", "--dry-run", "--quiet", "--verify"]
    assert push(arguments) == 0
    flip(folder / SHARD)
    capsys.readouterr()
    assert push(arguments) == 2
    said = capsys.readouterr().err
    assert f"{SHARD} has other bytes than namex/report.json lists" in said
    assert said.count("\n") == 1
