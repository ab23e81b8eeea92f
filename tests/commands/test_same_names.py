"""Options of the same meaning have one name in all commands; names of earlier versions stay."""

from pathlib import Path
from typing import Any

import pytest

from namex_hf.commands import compare, patch, report, score
from namex_hf.errors import UsageError
from namex_hf.training.arguments import read

PARSERS = {one.__name__.rpartition(".")[2]: one.parser_of("namex") for one in (compare, patch, report, score)}


@pytest.mark.parametrize(
    ("parser", "names"),
    [
        *((parser, ("--out",)) for parser in PARSERS),
        ("score", ("--out", "--output_path", "--output-path")),
        *((parser, ("--texts", "--text")) for parser in ("compare", "score")),
        *((parser, ("--recipes", "--recipe")) for parser in ("compare", "score")),
        ("patch", ("--recipe",)),
    ],
)
def test_of_the_parsers(parser: str, names: tuple[str, ...]) -> None:
    options = PARSERS[parser].options
    assert {options[name].dest for name in names} == {names[0].removeprefix("--")}


def read_tune(*words: str) -> tuple[Any, Any]:
    return read([*words, "--use_cpu"], "namex tune", "")


@pytest.mark.parametrize("out", ["--out", "--output_dir", "--output-dir"])
@pytest.mark.parametrize("model", [(), ("--model",), ("--model_name_or_path",)], ids=str)
def test_of_tune(tmp_path: Path, out: str, model: tuple[str, ...]) -> None:
    asked, training = read_tune(*model, "tiny-deepseek", out, str(tmp_path / "out"))
    assert (asked.model_name_or_path, training.output_dir) == ("tiny-deepseek", str(tmp_path / "out"))
    assert asked.compare == []


def test_tune_trains_others_beside_unless_told_not_to(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    asked, _ = read_tune(*out)
    assert (asked.model_name_or_path, asked.compare) == ("tiny", ["original", "ep-camex"])
    asked, _ = read_tune(*out, "--compare", "none")
    assert (asked.model_name_or_path, asked.compare) == ("tiny", [])
    with pytest.raises(UsageError, match="--compare none original: none stands alone"):
        read_tune(*out, "--compare", "none", "original")
    with pytest.raises(UsageError, match="accepted: original, ep-camex, namex, camex, none"):
        read_tune(*out, "--compare", "smear")
