"""The commands that a run of ``namex patch`` ends with: which they are, that they parse, and where there are none."""

import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from namex_hf.commands import patch
from namex_hf.evaluation.grid import field_options, grid, recipe_files

Lines = Callable[..., list[str]]
WORDS = ("--calibration-tokens", "1024", "--merge", "narrow")


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    """Runs ``namex patch`` and returns the commands of its last lines."""

    def run(*arguments: object) -> list[str]:
        assert patch.main([*map(str, arguments)], "namex patch") == 0
        shown = capsys.readouterr().err.splitlines()
        start = next((at for at, line in enumerate(shown) if line.startswith("next: ")), len(shown))
        return [line.removeprefix("next:").strip() for line in shown[start:]]

    return run


def parsed(line: str):
    """The options of a command that is stated whole."""
    program, command, *words = shlex.split(line)
    assert program == "namex"
    return import_module(f"namex_hf.commands.{command}").parser_of(f"namex {command}").parse_args(words)


def test_of_a_recipe_that_is_no_share(lines: Lines, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "a folder"
    compare, score, push = map(parsed, lines(toy, "--out", out, "--merge", "grouped", "--experts", 3))
    assert (compare.model, compare.out) == (str(toy), Path(f"{out}-compared"))
    (cell,) = grid(recipe_files([Path(name) for name in compare.recipes]), field_options(vars(compare)))
    assert (cell.recipe.merge.kind, cell.recipe.to_dict()["experts"]) == ("grouped", 3)
    assert score.model == [str(out), str(toy)]
    assert (push.folder, push.dry_run) == (out, True)


def test_of_several_shares(lines: Lines, odd, words: Path, tmp_path: Path) -> None:
    """The text that the run read goes along; each result is scored."""
    source, out = odd("qwen2_moe", torch.float32, tokenizer=True), tmp_path / "out"
    said = lines(source, "--out", out, "--keep", "0.5", "0.25", "--calibration-data", words, *WORDS)
    compare, score, _ = map(parsed, said)
    cells = grid(recipe_files([]), field_options(vars(compare)))
    assert [cell.recipe.merge.keep for cell in cells] == [0.75, 0.5, 0.25]
    assert {cell.recipe.calibration.data for cell in cells} == {str(words)}
    assert score.model == [str(out / "keep-0.5"), str(out / "keep-0.25"), str(source)]


@pytest.mark.parametrize("flag", ["--quiet", "--json", "--dry-run"])
def test_none_where_another_program_reads(lines: Lines, toy: Path, tmp_path: Path, flag: str) -> None:
    assert lines(toy, "--out", tmp_path / "out", flag) == []
