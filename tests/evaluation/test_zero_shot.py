"""Whole runs of ``eval/zero_shot.py`` on the packaged model."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCardData
from transformers import AutoTokenizer

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.evaluation.arithmetic import held_out_problems
from namex_hf.evaluation.candidates import candidates
from namex_hf.evaluation.zero_shot_report import ZeroShotReport, eval_results
from tests.helpers.checkpoints import forget_files
from tests.helpers.commands import Command
from tests.helpers.zero_shot import ROOT, SCRIPT, module_of, recipe, said, samples

TASKS = ("namex_definitions", "namex_sums", "namex_word_problems", "namex_text")


@pytest.fixture(scope="module")
def scored_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpatched model and a recipe that leaves it as it is, on every packaged task."""
    folder = tmp_path_factory.mktemp("scored")
    smoe = recipe(folder, "smoe", method="smoe")
    options = ["--recipe", smoe, "--models", "tiny", "--limit", "4", "--device", "cpu", "--output_path", folder / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["zero_shot.py", "--quiet", *map(str, options)])
        assert module_of(SCRIPT).main() == 0
    return folder


@pytest.fixture
def scored(scored_once: Path, tmp_path: Path) -> Path:
    """A copy of that run's output."""
    shutil.copytree(scored_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def test_smoe_answers_every_item_as_the_unpatched_model(scored: Path) -> None:
    for task in TASKS:
        assert said(scored / "tiny", task) == said(scored / "tiny+smoe", task)
        assert len(said(scored / "tiny", task)) == 4
    text = (scored / "report.md").read_text()
    assert "the two score alike on each of 4 items" in text


def test_every_number_of_the_report_stands_in_a_file(scored: Path, zero_shot: Command, tmp_path: Path) -> None:
    report = ZeroShotReport.from_json((scored / "report.json").read_text())
    assert {score.model for score in report.scores} == {"tiny", "tiny+smoe"}
    for score in report.scores:
        results = json.loads((scored / score.file).read_text())
        assert results["results"][score.task][f"{score.metric},{score.filter}"] == score.value
    exact = next(s for s in report.scores if s.task == "namex_word_problems" and s.model == "tiny")
    right = [sample["exact_match"] for sample in samples(scored / "tiny", exact.task)]
    assert exact.value == sum(right) / len(right)
    assert exact.items == 4
    assert report.run["versions"]["lm_eval"]
    assert report.run["seed"] == 1234
    assert report.model("tiny+smoe").recipe is not None

    before = (scored / "report.json").read_bytes()
    (tmp_path / "out" / "models").rename(tmp_path / "gone")  # a finished run asks for no model
    again = zero_shot(
        "--recipe", tmp_path / "smoe.yaml", "--models", "tiny", "--limit", "4", "--output_path", scored, "--quiet"
    )
    assert (again.status, again.out) == (0, "")
    assert (scored / "report.json").read_bytes() == before


def test_the_report_feeds_a_model_index(scored: Path) -> None:
    report = ZeroShotReport.from_json((scored / "report.json").read_text())
    entries = eval_results(report, "tiny")
    card = ModelCardData(model_name="tiny", eval_results=entries).to_dict()
    found = [result for one in card["model-index"][0]["results"] for result in [one]]
    assert {one["dataset"]["name"] for one in found} == set(TASKS)
    metric = next(one for one in found if one["dataset"]["name"] == "namex_sums")["metrics"][0]
    assert metric["type"] == "acc"
    assert metric["args"]["items"] == 4
    assert metric["args"]["stderr"] is not None


def test_another_run_is_not_mixed_in(scored: Path, zero_shot: Command) -> None:
    arguments = ("--models", "tiny", "--tasks", "namex_sums", "--output_path", scored)
    other = zero_shot(*arguments, "--limit", "3")
    assert other.status == 2
    assert "is of a run with another limit; use --overwrite or another --out" in other.err
    assert zero_shot(*arguments, "--limit", "3", "--overwrite").status == 0
    assert len(said(scored / "tiny", "namex_sums")) == 3


def test_a_patched_folder_is_compared_with_the_model_it_was_made_of(zero_shot: Command, tmp_path: Path) -> None:
    patch_checkpoint("tiny", tmp_path / "patched", Recipe())
    answer = zero_shot(
        "--models",
        "tiny",
        tmp_path / "patched",
        "--tasks",
        "namex_sums",
        "--limit",
        "3",
        "--output_path",
        tmp_path / "o",
    )
    assert answer.status == 0, answer.err
    report = ZeroShotReport.from_json((tmp_path / "o" / "report.json").read_text())
    assert "beside the model that it was made of" not in answer.out
    assert report.model("patched").original == "tiny"
    assert report.model("patched").recipe is not None
    assert report.model("patched").recipe["method"] == "namex-full"
    assert all((score.difference is not None) == (score.model == "patched") for score in report.scores)
    alone = zero_shot(
        "--models", tmp_path / "patched", "--tasks", "namex_sums", "--limit", "3", "--out", tmp_path / "a"
    )
    assert f"beside the model that it was made of: namex score {tmp_path}/patched tiny\n" in alone.out


def test_a_result_of_a_result_is_compared_with_that(zero_shot: Command, tmp_path: Path) -> None:
    """Also beside the first model, and beside one of the same structure and other bytes."""
    patch_checkpoint("tiny", tmp_path / "g12", Recipe(merge="grouped", experts=12))
    patch_checkpoint(tmp_path / "g12", tmp_path / "g8", Recipe(merge="grouped", experts=8))
    patch_checkpoint("tiny", tmp_path / "other", Recipe(merge="grouped", experts=12, method="ep-camex"))
    rows = candidates([str(tmp_path / name) for name in ("g12", "g8", "other")] + ["tiny"], [])
    assert {row.label: row.original for row in rows} == {"g12": "tiny", "g8": "g12", "other": "tiny", "tiny": None}
    answer = zero_shot(
        *("--models", tmp_path / "other", tmp_path / "g12", tmp_path / "g8", "--tasks", "namex_sums", "--limit", "3"),
        *("--output_path", tmp_path / "o"),
    )
    assert answer.status == 0, answer.err
    report = ZeroShotReport.from_json((tmp_path / "o" / "report.json").read_text())
    assert {model.label: model.original for model in report.models} == {"other": None, "g12": None, "g8": "g12"}
    assert all((score.difference is not None) == (score.model == "g8") for score in report.scores)


def test_another_router_is_compared_with_itself_unmerged(zero_shot: Command, tmp_path: Path) -> None:
    """The difference of a cosine row is to cosine SMoE, by the same items; without it to the original."""
    full = recipe(tmp_path, "full", routing="cosine")
    smoe = recipe(tmp_path, "smoe", routing="cosine", method="smoe")
    out = tmp_path / "out"
    asked = ("--models", "tiny", "--tasks", "namex_text", "--limit", "2", "--output_path", out)
    answer = zero_shot(*asked, "--recipe", full, smoe)
    assert answer.status == 0, answer.err
    report = ZeroShotReport.from_json((out / "report.json").read_text())
    scores = {s.model: s for s in report.scores if s.metric == "bits_per_byte"}
    to = {"tiny": None, "tiny+full": "tiny+smoe", "tiny+smoe": "tiny"}
    assert {name: one.baseline for name, one in scores.items()} == to
    for name, baseline in to.items():
        if baseline is not None:
            apart = scores[name].value - scores[baseline].value
            assert scores[name].difference.mean == pytest.approx(apart, abs=1e-9)
    assert scores["tiny+full"].value - scores["tiny"].value != pytest.approx(scores["tiny+full"].difference.mean)
    assert f"tiny+full, bits_per_byte: {scores['tiny+full'].difference.mean:+.4f} to tiny+smoe" in answer.out
    alone = zero_shot(*asked, "--recipe", full)
    assert alone.status == 0, alone.err
    report = ZeroShotReport.from_json((out / "report.json").read_text())
    assert {s.model: s.baseline for s in report.scores} == {"tiny": None, "tiny+full": "tiny"}


def test_which_rows_are_compared_with_an_unmerged_one(tmp_path: Path) -> None:
    """Folders and recipes together; the router must be the same one, and made of the same model."""
    cosine = {"routing": "cosine", "temperature": "norms"}
    patch_checkpoint("tiny", tmp_path / "smoe", Recipe(method="smoe", **cosine))
    patch_checkpoint("tiny", tmp_path / "full", Recipe(**cosine))
    patch_checkpoint("tiny-deepseek", tmp_path / "deepseek", Recipe(**cosine))
    patch_checkpoint(
        "tiny", tmp_path / "sharp", Recipe(routing="cosine", temperature="entropy", calibration_tokens=512)
    )
    names = ["full", "deepseek", "sharp", "smoe"]
    rows = candidates([str(tmp_path / name) for name in names], [])
    assert {row.label: row.baseline for row in rows} == {"full": "smoe", "deepseek": None, "sharp": None, "smoe": None}
    trained = tmp_path / "full" / "namex" / "report.json"
    found = json.loads(trained.read_text())
    trained.write_text(json.dumps({**found, "run": {**found["run"], "training": {"kinds": ["experts"]}}}))
    forget_files(tmp_path / "full")
    rows = candidates([str(tmp_path / name) for name in names] + ["tiny"], [])
    to = {row.label: row.baseline for row in rows}
    assert to == {"full": "tiny", "deepseek": None, "sharp": "tiny", "smoe": "tiny", "tiny": None}


def test_a_model_that_changed_in_place_is_scored_no_old_scores(zero_shot: Command, tmp_path: Path) -> None:
    source = Path(shutil.copytree(PACKAGED / "tiny", tmp_path / "source"))
    command = ("--models", source, "--tasks", "namex_definitions", "--limit", "4", "--output_path", tmp_path / "o")
    assert zero_shot(*command).status == 0
    results = tmp_path / "o/source/namex_definitions/results.json"
    first = results.read_bytes()
    for path in source.iterdir():
        path.touch()
    assert zero_shot(*command).status == 0
    assert results.read_bytes() == first
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "model.safetensors"):
        data = (source / name).read_bytes()
        (source / name).write_bytes(data[:-1] + b"?" if name.endswith(".safetensors") else data + b" ")
        answer = zero_shot(*command)
        assert answer.status == 2, name
        assert "is of a run with another source; use --overwrite or another --out" in answer.err
        assert results.read_bytes() == first
        (source / name).write_bytes(data)
    assert zero_shot(*command).status == 0
    assert results.read_bytes() == first


@pytest.mark.parametrize("name", ["results.json", "samples_namex_sums.jsonl"])
def test_damaged_results_are_made_again(scored: Path, zero_shot: Command, name: str) -> None:
    """Of the answers in the journal, so that they are the same."""
    path = scored / "tiny" / "namex_sums" / name
    whole = path.read_bytes()
    score = json.loads((path.parent / "results.json").read_text())["results"]
    arguments = ("--models", "tiny", "--tasks", "namex_sums", "--limit", "4", "--output_path", scored)
    for damaged in (b"", whole[:-20], b"garbage", whole.replace(b"1", b"2", 1)):
        path.write_bytes(damaged)
        assert zero_shot(*arguments).status == 0
        assert json.loads((path.parent / "results.json").read_text())["results"] == score
    assert said(scored / "tiny", "namex_sums") == said(scored / "tiny+smoe", "namex_sums")


def test_the_official_gsm8k_reads_a_local_copy(zero_shot: Command, tmp_path: Path) -> None:
    for split in ("train", "test"):
        lines = [json.dumps(problem) for problem in held_out_problems()[:6]]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    module_of(ROOT / "eval" / "make_local_gsm8k.py").write(tmp_path, tmp_path / "data")
    answer = zero_shot(
        *("--models", "tiny", "--tasks", "gsm8k", "--data", tmp_path / "data", "--limit", "4"),
        *("--output_path", tmp_path / "out"),
    )
    assert answer.status == 0, answer.err
    report = ZeroShotReport.from_json((tmp_path / "out" / "report.json").read_text())
    assert {score.filter for score in report.scores} == {"strict-match", "flexible-extract"}
    assert all(score.num_fewshot == 0 and score.data["dataset"] == "openai/gsm8k" for score in report.scores)
    # These are problems that the model can do: the official prompt and filter find its answers.
    strict = next(score for score in report.scores if score.filter == "strict-match")
    assert strict.value >= 0.5


def test_perplexity_of_any_text(zero_shot: Command, tmp_path: Path) -> None:
    text = tmp_path / "a book.txt"
    text.write_text("\n\n".join(f"Emma walked to chapter {n} and said nothing more of it." * 20 for n in range(5)))
    answer = zero_shot(
        *("--tasks", "none", "--text", text, "--models", "tiny", "--recipe", recipe(tmp_path, "ep", method="ep-camex")),
        *("--output_path", tmp_path / "out"),
    )
    assert answer.status == 0, answer.err
    report = ZeroShotReport.from_json((tmp_path / "out" / "report.json").read_text())
    bits = [score for score in report.scores if score.metric == "bits_per_byte"]
    assert [score.task for score in bits] == ["text_a_book"] * 2
    assert bits[0].stderr is not None
    assert bits[1].difference is not None
    assert bits[1].difference.test == "t"
    assert bits[1].difference.mean == pytest.approx(bits[1].value - bits[0].value)


def test_examples_come_before_the_question(zero_shot: Command, tmp_path: Path) -> None:
    answer = zero_shot(
        *("--models", "tiny", "--tasks", "namex_word_problems", "--num-fewshot", "2", "--limit", "1"),
        *("--output_path", tmp_path / "out"),
    )
    assert answer.status == 0, answer.err
    (sample,) = samples(tmp_path / "out" / "tiny", "namex_word_problems")
    assert sample["arguments"][0][0].count("Question:") == 3


def test_a_task_without_examples_and_with_two(zero_shot: Command, tmp_path: Path) -> None:
    """Side by side in one report; each answer in the folder of its own number."""
    out = tmp_path / "out"
    asked = ("--models", "tiny", "--limit", "1", "--output_path", out)
    answer = zero_shot(*asked, "--tasks", "namex_sums,namex_sums:2")
    assert answer.status == 0, answer.err
    report = ZeroShotReport.from_json((out / "report.json").read_text())
    assert [(s.task, s.num_fewshot, s.file) for s in report.scores] == [
        ("namex_sums", 0, "tiny/namex_sums/results.json"),
        ("namex_sums", 2, "tiny/namex_sums-2shot/results.json"),
    ]
    for folder, questions in (("namex_sums", 1), ("namex_sums-2shot", 3)):
        lines = (out / "tiny" / folder / "samples_namex_sums.jsonl").read_text().splitlines()
        arguments = json.loads(lines[0])["arguments"]
        assert {one[0].count("Question:") for one in arguments} == {questions}
    other = zero_shot(*asked, "--tasks", "namex_sums", "--num_fewshot", "1")
    assert other.status == 2
    assert "is of a run with another num_fewshot and task; use --overwrite" in other.err


def test_questions_and_examples_are_turns_of_a_chat(zero_shot: Command, tmp_path: Path) -> None:
    """As the model's own template writes them; in the same folder other scores than without it are refused."""
    asked = ("--models", "tiny", "--tasks", "namex_word_problems:1", "--limit", "1", "--output_path", tmp_path / "out")
    answer = zero_shot(*asked, "--apply_chat_template")
    assert answer.status == 0, answer.err
    folder = tmp_path / "out" / "tiny" / "namex_word_problems-1shot"
    (sample,) = [json.loads(line) for line in (folder / "samples_namex_word_problems.jsonl").read_text().splitlines()]
    written = sample["arguments"][0][0]
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n|$)", written, re.DOTALL)
    assert [role for role, _ in turns] == ["user", "assistant", "user", "assistant"]
    assert turns[2][1] == f"Question: {sample['doc']['question']}\nAnswer:"
    assert "####" in turns[1][1]
    assert turns[3][1] == ""
    chat = [{"role": role, "content": content} for role, content in turns[:3]]
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "tiny")
    assert written == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ZeroShotReport.from_json((tmp_path / "out" / "report.json").read_text()).run["apply_chat_template"] is True
    assert "asked in the chat format" in (tmp_path / "out" / "report.md").read_text()
    plain = zero_shot(*asked)
    assert (plain.status, "is of a run with another apply_chat_template" in plain.err) == (2, True)


def test_a_model_without_a_chat_template(zero_shot: Command, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACKAGED / "tiny", tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    answer = zero_shot(
        *("--models", folder, "--tasks", "namex_sums", "--apply_chat_template", "--output_path", tmp_path / "out")
    )
    assert answer.status == 2
    assert "plain has no chat template; --apply_chat_template needs one" in answer.err
