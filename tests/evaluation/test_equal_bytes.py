"""A comparison at equal bytes: real runs on a toy, how they go on, and the arithmetic of the table."""

import json
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from namex_hf.checkpoint.resolve import resolve
from namex_hf.commands import compare as command
from namex_hf.evaluation import equal_bytes
from namex_hf.evaluation.compare import BEGINS, FLOOR, KNOWN, ORIGINAL, RunOptions, compare, make_plan_of
from namex_hf.evaluation.equal_bytes import Quantising, sized_rows
from namex_hf.evaluation.grid import grid
from namex_hf.evaluation.loading import load, tokenizer_of
from namex_hf.evaluation.perplexity import perplexities
from namex_hf.evaluation.settings import Settings
from namex_hf.patching.text import text_of
from namex_hf.progress import ProgressEvent
from namex_hf.quantising.folder import write_quantised
from namex_hf.quantising.matrices import Storage, matrices_of
from tests.helpers.measurements import result

Said = pytest.CaptureFixture[str]
LABEL = "default"
FORMS = [f"{LABEL}, 4 bit, rtn", f"{LABEL}, 3 bit, rtn"]


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers of bits a model, three of the original."""
    assert equal_bytes.BITS == (8, 4, 3)
    monkeypatch.setattr(equal_bytes, "BITS", (4, 3))


def events_of(folder: Path, settings: Settings, out: Path, **options: Any) -> tuple[list[tuple[str, str]], Any]:
    """Which cells began or were known, and the comparison."""
    events = []

    def note(event: ProgressEvent) -> None:
        if event.stage in (BEGINS, KNOWN):
            events.append((event.model, event.stage))

    cells = grid({}, {"merge": ["grouped"], "experts": [4]})
    plan = make_plan_of(resolve(str(folder)), settings, cells, **options)
    return events, compare(plan, out, RunOptions(), note)


def test_the_command_then_the_same_again(folder: Path, prose: Path, tmp_path: Path, capsys: Said):
    out = tmp_path / "out"
    few = ["--texts", str(prose), "--tokens", "64", "--problems", "0", "--gptq-tokens", "1024"]
    asked = [str(folder), "--merge", "grouped", "--experts", "4", *few]
    asked += ["--equal-bytes", "--quantiser", "gptq", "--out", str(out)]
    assert command.main(asked) == 0
    assert "equal bytes:" in capsys.readouterr().out
    told = json.loads((out / "comparison.json").read_text())
    rows = told["equal_bytes"]
    assert [row["label"] for row in told["rows"]] == [ORIGINAL, FLOOR, LABEL]
    assert {row["row"]["label"] for row in rows} == {
        *(ORIGINAL, LABEL),
        *(f"{label}, {bits} bit, gptq" for label in (ORIGINAL, LABEL) for bits in (4, 3)),
        f"{ORIGINAL}, 2 bit, gptq",
    }
    assert [row["bytes"] for row in rows] == sorted((row["bytes"] for row in rows), reverse=True)
    for text in ((out / "comparison.md").read_text(), (out / "index.html").read_text()):
        assert text.count("4 bit, gptq") == 2
        assert "Equal bytes" in text
    assert {path.name for path in out.iterdir()} & {"waiting", "work", "models"} == set()

    shown = {row["row"]["label"]: row for row in rows}
    source = resolve(str(folder))
    write_quantised(matrices_of(source), tmp_path / "alone", 2, text_of(command.gptq_text(None, 1024), source).ids)
    texts, tokenizer = {"prose": prose.read_text("utf-8")}, tokenizer_of(folder)
    alone, before = (perplexities(load(one), tokenizer, texts, 64)["mean"] for one in (tmp_path / "alone", folder))
    assert shown[f"{ORIGINAL}, 2 bit, gptq"]["row"]["ratio"] == pytest.approx(alone / before, rel=1e-5)
    assert shown[ORIGINAL]["bits"] == 16
    assert shown[LABEL]["bits"] == 8

    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert command.main([*asked, "--quiet"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before


def test_a_result_waits_for_its_forms(folder: Path, few: Settings, tmp_path: Path):
    """It is made again where it was measured without them; a run that ends before them goes on with it."""
    few, out = replace(few, tokens=64), tmp_path / "out"
    events_of(folder, few, out)
    stop = FORMS[1]

    def interrupt(event: ProgressEvent) -> None:
        if (event.model, event.stage) == (stop, BEGINS):
            raise KeyboardInterrupt

    cells = grid({}, {"merge": ["grouped"], "experts": [4]})
    plan = make_plan_of(resolve(str(folder)), few, cells, ("rtn",))
    with pytest.raises(KeyboardInterrupt):
        compare(plan, out, RunOptions(), interrupt)
    assert (out / "waiting" / LABEL / "config.json").is_file()
    events, found = events_of(folder, few, out, quantisers=("rtn",))
    began = [label for label, stage in events if stage == BEGINS]
    assert began == [stop]
    assert not (out / "waiting").exists()
    assert len(found.sized) == 1 + 3 + 1 + 2


def test_the_forms_of_a_model_that_failed_fail(folder: Path, few: Settings, tmp_path: Path):
    def kill(event: ProgressEvent) -> None:
        if event.model == LABEL and event.stage.startswith("perplexity"):
            for process in multiprocessing.active_children():
                process.kill()

    cells = grid({}, {"merge": ["grouped"], "experts": [4]})
    plan = make_plan_of(resolve(str(folder)), replace(few, tokens=64), cells, ("rtn",))
    found = compare(plan, tmp_path / "out", RunOptions(), kill)
    assert found.failed.keys() == {LABEL, *FORMS}
    assert {found.failed[label] for label in FORMS} == {f"{LABEL} failed"}
    assert {one.row.title for one in found.sized} == {ORIGINAL}


def test_a_result_of_a_class_of_its_own_has_no_other_forms(folder: Path, few: Settings):
    cells = grid({}, {"base": ["mean"]})
    plan = make_plan_of(resolve(str(folder)), few, cells, ("rtn",))
    assert plan.forms.keys() == {ORIGINAL}
    assert make_plan_of(resolve(str(folder)), few, cells).forms == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantiser", "rtn"], "--quantiser belongs to --equal-bytes"),
        (["--gptq-tokens", "99"], "--gptq-tokens belongs to --equal-bytes"),
        (["--equal-bytes", "--gptq-tokens", "0"], "recipe field 'calibration_tokens' is 0"),
        (["--equal-bytes", "--gptq-data", "nowhere.txt"], "calibration data nowhere.txt: no such file or folder"),
    ],
)
def test_what_is_refused(tmp_path: Path, capsys: Said, arguments: list[str], said: str):
    assert command.main(["tiny", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_by_hand():
    """A model of 100 routed numbers, 10 others quantised and 40 bytes of the rest; one of half the routed numbers."""
    stored = {
        "a, 8 bit, rtn": Storage(100, 900, 10, 90, 40),
        "a, 2 bit, rtn": Storage(100, 260, 10, 90, 40),
        "b, 4 bit, rtn": Storage(50, 230, 10, 90, 40),
    }
    shifts = {"a": 0.0, "a, 8 bit, rtn": 0.001, "a, 2 bit, rtn": 0.3, "b": 0.1, "b, 4 bit, rtn": 0.1}
    results = {name: result(number, shift) for number, (name, shift) in enumerate(shifts.items())}
    for name, storage in stored.items():
        results[name]["stored"] = asdict(storage)
    forms = {
        "a": [(Quantising(8, "rtn"), "a, 8 bit, rtn"), (Quantising(2, "rtn"), "a, 2 bit, rtn")],
        "b": [(Quantising(4, "rtn"), "b, 4 bit, rtn"), (Quantising(3, "rtn"), "b, 3 bit, rtn")],
        "c": [(Quantising(3, "rtn"), "c, 3 bit, rtn")],
    }
    found = {(one.row.title, one.weights): one for one in sized_rows(forms, results, "a")}
    assert {where: (one.bits, one.bytes) for where, one in found.items()} == {
        ("a", "16 bit"): (16, 220 + 40),
        ("b", "16 bit"): (8, 120 + 40),
        ("a", "8 bit, rtn"): (9, 124 + 40),
        ("a", "2 bit, rtn"): (2.6, 44 + 40),
        ("b", "4 bit, rtn"): (2.3, 40 + 40),
    }
    ratios = {where: one.row.ratio for where, one in found.items()}
    for where, one in found.items():
        smaller = [ratios[other] for other, rival in found.items() if rival.bytes <= one.bytes]
        assert ("perplexity" in one.best) == (ratios[where] == min(smaller))
    assert "perplexity" not in found["a", "2 bit, rtn"].best
    assert "perplexity" in found["b", "4 bit, rtn"].best
    assert sized_rows(forms, {name: results[name] for name in ("a", "b", "b, 4 bit, rtn")}, "a") == []
