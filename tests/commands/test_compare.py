"""``namex-compare`` on the packaged model: what it writes and prints, how it goes on, what it answers to bad input."""

import base64
import hashlib
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from namex_hf import Recipe
from namex_hf.checkpoint.resolve import resolve
from namex_hf.commands import compare as command
from namex_hf.evaluation.perplexity import HELD_OUT
from namex_hf.evaluation.table import Table
from tests.helpers.process import SERVER

SOURCE = "tiny-deepseek"
ROWS = ("original", "routed experts removed", "nash, seed 0", "nash, seed 1", "nash, mean of 2 seeds")
Said = pytest.CaptureFixture[str]


def ran(*arguments: object) -> int:
    return command.main([str(one) for one in arguments])


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, which leave the number of experts open."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "nash.yaml").write_text("merge: grouped\n")
    (folder / "peer.yaml").write_text("merge: grouped\nmethod: ep-camex\n")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two short texts, as arguments."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("code", "prose"):
        (folder / f"{name}.txt").write_text((HELD_OUT / f"{name}.txt").read_text("utf-8")[:6000], "utf-8")
    return ["--texts", str(folder / "code.txt"), str(folder / "prose.txt")]


@pytest.fixture(scope="module")
def given(texts: list[str]) -> list[str]:
    """Two windows of each text and four problems, as arguments."""
    return [*texts, "--tokens", "1024", "--problems", "4", "--experts", "12"]


@pytest.fixture(scope="module")
def quick(texts: list[str]) -> list[str]:
    """As little as can be, as arguments."""
    return [*texts, "--tokens", "64", "--problems", "0", "--experts", "12", "--quiet"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, recipes: Path, given: list[str]) -> Path:
    """One recipe, two seeds; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert ran(SOURCE, "--recipes", recipes / "nash.yaml", *given, "--seed", 0, 1, "--quiet", "--out", out) == 0
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


def table(text: str, number: int) -> list[dict[str, str]]:
    """A markdown table as rows by title."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    ends = [place for place, line in enumerate(lines) if line.startswith("|---")]
    start = ends[number] - 1
    stop = ends[number + 1] - 1 if number + 1 < len(ends) else len(lines)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:stop]]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def measured(folder: Path) -> list[str]:
    """Keys of the results in a comparison's log, in the order in which they were added."""
    lines = (folder / "cells" / "results.jsonl").read_text().splitlines()
    return [entry["key"] for entry in map(json.loads, lines) if "key" in entry]


def test_what_is_written(made: Path):
    names = {path.name for path in made.iterdir()}
    assert names - {"comparison.png", "comparison.svg"} == {
        ".namex",
        "cells",
        "comparison.json",
        "comparison.md",
        "index.html",
    }
    assert len(measured(made)) == 4
    told = json.loads((made / "comparison.json").read_text())
    assert [row["title"] for row in told["rows"]] == list(ROWS)
    assert told["model"]["name"] == SOURCE
    assert told["run"]["versions"]["torch"] == torch.__version__
    assert told["failed"] == {}
    assert told["rows"][3]["recipe"] == Recipe(merge="grouped", experts=12, seed=1).to_dict()
    assert "/" not in json.dumps(told["run"]), "a local path was stored"


def test_the_table_for_documents(made: Path):
    text = (made / "comparison.md").read_text()
    told = {row["title"]: row for row in json.loads((made / "comparison.json").read_text())["rows"]}
    quality, costs = table(text, 0), table(text, 1)
    assert [row["recipe"] for row in quality] == ["original, perplexity", *ROWS]
    assert [row["recipe"] for row in costs] == list(ROWS)
    row, numbers = quality[3], told["nash, seed 0"]
    low, high = numbers["interval"]
    assert row["mean (95 %)"] == f"{numbers['ratio']:.3f} ({low:.3f} to {high:.3f})"
    assert low < numbers["ratio"] < high
    assert row["worst"] == f"{numbers['worst'][1]:.3f} {numbers['worst'][0]}"
    assert numbers["worst"][1] == max(numbers["ratios"].values())
    assert row["code"] == f"{numbers['ratios']['code']:.3f}"
    assert row["exact, %"] in ("0.0", "25.0", "50.0", "75.0", "100.0")
    mean, spread = told["nash, mean of 2 seeds"], told["nash, mean of 2 seeds"]["spread"]
    assert quality[5]["mean (95 %)"] == f"{mean['ratio']:.3f} ± {spread['ratio']:.3f}"
    assert (
        quality[0]["mean (95 %)"]
        == f"{json.loads((made / 'comparison.json').read_text())['original_perplexity']['mean']:.2f}"
    )
    for row in costs[2:]:
        assert float(row["patch, s"]) >= 0
        assert float(row["peak, MB"]) > 100
        assert (row["MB"], row["active, M"]) == ("6.58", "2.31")
    assert costs[0]["patch, s"] == costs[1]["decode, tokens/s"] == ""
    assert "the mean over seeds of calibration text, ± the standard deviation over seeds" in text


def test_the_page_fetches_nothing_and_runs_nothing_but_its_sorting(made: Path):
    """The policy names the one script by its hash, so that a browser runs no other."""
    text = (made / "index.html").read_text()
    assert not re.findall(r"<iframe|<object|@import|\bon\w+=", text)
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none';")
    assert re.findall(r"script-src ([^;]*)", policy) == [f"'sha256-{digest}'"]
    assert all(place.startswith("data:") for place in re.findall(r'(?:src|srcset|href)="([^"]*)"', text))
    for row in ROWS:
        assert f"<td>{row}</td>" in text
    assert text.count("merge: grouped") == 2


def test_the_same_command_measures_nothing_and_prints_the_table(
    copied: Path, recipes: Path, given: list[str], capsys: Said, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    before = {path: path.stat().st_mtime_ns for path in (copied / "cells").iterdir()}
    assert ran(SOURCE, "--recipes", recipes / "nash.yaml", *given, "--seed", 0, 1, "--out", copied) == 0
    assert {path: path.stat().st_mtime_ns for path in (copied / "cells").iterdir()} == before
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    numbers = json.loads((copied / "comparison.json").read_text())["rows"][2]
    low, high = numbers["interval"]
    assert f"{numbers['ratio']:.3f} ({low:.3f} to {high:.3f})" in said.out  # on one line, however narrow
    assert lines[-1] == str(copied / "index.html")
    assert said.err == ""


def test_the_numbers_are_printed_as_json(copied: Path, recipes: Path, given: list[str], capsys: Said):
    assert ran(SOURCE, "--recipes", recipes / "nash.yaml", *given, "--seed", 0, 1, "--json", "--out", copied) == 0
    assert capsys.readouterr() == ((copied / "comparison.json").read_text(), "")


def test_one_value_more_is_measured_and_told(copied: Path, recipes: Path, given: list[str], capsys: Said):
    finer = [SOURCE, *given, "--granularity", "expert", "matrix", "--out", copied]
    assert ran(*finer, "--recipes", recipes / "peer.yaml") == 2
    refused = capsys.readouterr().err
    assert "peer.yaml with experts=12 granularity=expert: 'granularity' is a choice of the Nash bargain" in refused
    assert ran(*finer, "--recipes", recipes / "nash.yaml") == 0
    assert re.fullmatch(r"4/4 nash, granularity expert: \d+ s\n", capsys.readouterr().err)
    rows = json.loads((copied / "comparison.json").read_text())["rows"]
    assert [row["title"] for row in rows[2:]] == ["nash, granularity expert", "nash, granularity matrix"]


def test_the_rows_of_a_wide_table_stay_together_on_a_narrow_screen():
    titles = ["recipe", "experts", "one column", "two", "three"]
    rows = [["a label that is much too long for it", "8", "1.234 ± 0.567", "x" * 30, "y" * 30]]
    for width, parts in ((200, 1), (80, 2), (60, 3), (10, 3)):
        found = Table(titles, rows).parts(width)
        assert len(found) == parts
        assert [title for part, _ in found for title in part[2:]] == titles[2:]
        assert all(part[:2] == titles[:2] and cells[0][:2] == rows[0][:2] for part, cells in found)


def test_a_killed_run_goes_on(recipes: Path, quick: list[str], tmp_path: Path):
    """The third model is under way when the command is killed: its process ends as well, and it begins anew."""
    out = tmp_path / "out"
    arguments = [SOURCE, "--recipes", str(recipes / "nash.yaml"), *quick, "--out", str(out)]
    process = SERVER.Process(target=command.main, args=(arguments,))
    process.start()
    log = out / "work" / "nash.log"
    while process.is_alive() and not (out / "work" / "nash").is_dir():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9
    done = (out / "cells" / "results.jsonl").read_bytes()
    assert len(measured(out)) == 2
    assert not (out / "comparison.json").exists()
    if Path("/proc").is_dir():
        while any(log.resolve() in opened(one) for one in Path("/proc").glob("[0-9]*")):
            time.sleep(0.01)
    assert ran(*arguments) == 0
    assert (out / "cells" / "results.jsonl").read_bytes().startswith(done)
    assert len(measured(out)) == 3
    assert not (out / "work").exists()
    told = json.loads((out / "comparison.json").read_text())
    assert [row["title"] for row in told["rows"]] == ["original", "routed experts removed", "nash"]


def opened(process: Path) -> set[Path]:
    """Files that a process has open, as far as can be seen."""
    try:
        return {link.resolve() for link in (process / "fd").iterdir()}
    except OSError:
        return set()


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A model that runs on plain text, with a row of numbers for a token of chats that no patch accepts."""
    folder = Path(shutil.copytree(resolve(SOURCE).folder, tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_start|>")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_recipes_that_fail(damaged: Path, recipes: Path, quick: list[str], tmp_path: Path, capsys: Said):
    out = tmp_path / "out"
    assert ran(damaged, "--recipes", recipes, *quick[:-1], "--out", out) == 1
    said = capsys.readouterr()
    reason = "tensor model.embed_tokens.weight in model.safetensors holds NaN or infinite values"
    for label in ("nash", "peer"):
        assert f"namex-compare: {label} failed: {reason}\n" in said.err
        assert f"Failed: {label}: {reason}." in (out / "comparison.md").read_text()
    assert "3/4 nash: failed, about" in said.err
    told = json.loads((out / "comparison.json").read_text())
    assert [row["title"] for row in told["rows"]] == ["original", "routed experts removed"]
    assert told["failed"] == {"nash": reason, "peer": reason}
    assert not list((out / "work").glob("*")), "something of a failed cell was left"


def test_an_original_that_cannot_be_scored(recipes: Path, quick: list[str], tmp_path: Path, capsys: Said):
    folder = Path(shutil.copytree(resolve(SOURCE).folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert ran(folder, "--recipes", recipes, *quick, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        "namex-compare: error: model cannot be scored as it is: the model's losses on the text 'code' are no finite "
        "numbers\n"
    )
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_rest_is_written(
    copied: Path, recipes: Path, given: list[str], capsys: Said, monkeypatch: Any
):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "namex_hf.report.pictures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "namex_hf.report.pictures.comparison", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for path in copied.glob("comparison.*"):
        path.unlink()
    assert ran(SOURCE, "--recipes", recipes / "nash.yaml", *given, "--seed", 0, 1, "--out", copied) == 0
    assert "no picture: it needs the extra 'report': pip install 'namex-hf[report]'" in capsys.readouterr().err
    assert {path.name for path in copied.glob("comparison.*")} == {"comparison.json", "comparison.md"}
    assert "<img" not in (copied / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0"], "--jobs 0: accepted: numbers from 1"),
        (["--recipes", "nowhere"], "--recipes nowhere: no such file or folder"),
        (["--experts", "8", "many"], "recipe field 'experts' is 'many'; accepted: int"),
        (["--merge", "grouped"], "the default recipe with merge=grouped: merge 'grouped' needs 'experts'"),
        (["--merge", "grouped", "--experts", "17"], "experts=17: recipe field 'experts' is 17; this model has 16"),
        (["--device", "tpu"], "the default recipe with device=tpu: recipe field 'device' is 'tpu'"),
        (["--device", "cpu", "cuda"], "unrecognized arguments: cuda"),
        (["--tokens", "1"], "--tokens 1: accepted: numbers from 2"),
        (["--problems", "201"], "--problems 201: accepted: 0 to 200"),
        (["--texts", "nowhere.txt"], "--texts nowhere.txt cannot be read"),
        (["--revision", "main"], "--revision main belongs to a Hub id"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys: Said, arguments: list[str], said: str):
    try:
        status = ran(SOURCE, *arguments, "--out", tmp_path / "out")
    except SystemExit as error:  # of the parser
        status = error.code
    found = capsys.readouterr()
    assert status == 2
    assert found.err.startswith("namex-compare: error: ")
    assert said in found.err
    assert found.err.count("\n") == 1
    assert found.out == ""
    assert not (tmp_path / "out").exists()


def test_another_comparison_in_the_folder(copied: Path, recipes: Path, given: list[str], capsys: Said):
    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in copied.rglob("*") if path.is_file()}

    before = files()
    for model, more, what in ((SOURCE, ["--problems", "3"], "problems"), ("tiny", [], "source")):
        assert ran(model, "--recipes", recipes, *given, *more, "--out", copied) == 2
        assert f"belongs to a run with another {what}; use --overwrite or another folder" in capsys.readouterr().err
        assert files() == before


def test_overwriting_begins_anew(copied: Path, recipes: Path, quick: list[str]):
    before = measured(copied)
    assert ran(SOURCE, "--recipes", recipes / "nash.yaml", *quick, "--overwrite", "--out", copied) == 0
    after = measured(copied)
    assert len(after) == 3
    assert not {*after} & {*before}
    titles = table((copied / "comparison.md").read_text(), 0)[0]
    assert list(titles) == ["recipe", "experts", "mean (95 %)", "worst", "code", "prose"]  # no problems, no answers


@pytest.mark.parametrize(("gone", "said"), [(True, "has no tokenizer;"), (False, "has no tokenizer that transformers")])
def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: Said, gone: bool, said: str):
    folder = Path(shutil.copytree(resolve(SOURCE).folder, tmp_path / "model"))
    for file in folder.glob("tokenizer*"):
        file.unlink() if gone else file.write_text("{]")
    assert ran(folder, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
