"""Which row of an evaluation report is a folder's, and what the card shows of it."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from namex_hf import patch_checkpoint
from namex_hf.checkpoint.source import open_checkpoint
from namex_hf.errors import CheckpointError, UsageError
from namex_hf.evaluation.statistics import paired
from namex_hf.evaluation.zero_shot_report import Score, ScoredModel, ZeroShotReport
from namex_hf.hub.benchmarks import benchmark_files
from namex_hf.hub.scores import read_evaluation, row_of, with_scores
from namex_hf.record import Report
from tests.helpers.commands import Command, assert_refused
from tests.helpers.hub import Hub


@pytest.fixture(scope="session")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "out"
    patch_checkpoint(model, out)
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


def report_of(folder: Path) -> Report:
    return Report.from_json((folder / "namex/report.json").read_text())


def score(label: str, task: str = "sums", **changes: Any) -> Score:
    values: dict[str, Any] = {
        "model": label,
        "task": task,
        "metric": "acc",
        "filter": "none",
        "value": 0.75,
        "stderr": 0.025,
        "items": 300,
        "num_fewshot": 0,
        "higher_is_better": True,
        "data": {"dataset": "json", "config": None, "split": "test"},
        "file": f"{label}/{task}/results.json",
    }
    return Score(**(values | changes))


def evaluation(*models: ScoredModel, scores: list[Score] | None = None) -> ZeroShotReport:
    run = {"limit": None, "seed": 1234, "dtype": "auto", "versions": {"lm_eval": "0.4.13"}}
    return ZeroShotReport(run, list(models), scores or [score(model.label) for model in models])


def scored(folder: Path, label: str = "out") -> ScoredModel:
    """A row that scored the folder itself."""
    checkpoint = open_checkpoint(folder)
    return ScoredModel(label, "out", None, checkpoint.fingerprint(), checkpoint.config["namex"], None, "auto")


def write(found: ZeroShotReport, path: Path, weights: Path | None) -> Path:
    """The report, with results beside it that say which files were scored."""
    path.mkdir()
    if weights is not None:
        identity = open_checkpoint(weights).identity
        identity.settle()
        files = identity.record()
        for one in found.scores:
            (path / one.file).parent.mkdir(parents=True, exist_ok=True)
            (path / one.file).write_text(json.dumps({"run": {"files": files}}))
    (path / "report.json").write_text(found.to_json())
    return path / "report.json"


def train(folder: Path) -> None:
    """Other numbers at the same places."""
    weights = max(folder.glob("model*.safetensors"), key=lambda file: file.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")


def test_the_row_that_scored_these_files(folder: Path, made: Path, tmp_path: Path):
    found = evaluation(replace(scored(folder, "tiny"), fingerprint="0" * 64), scored(folder))
    path = write(found, tmp_path / "scores", folder)
    assert row_of(read_evaluation(path), path, folder) == "out"
    copied = Path(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    assert row_of(found, path, copied) == "out", "times differ, bytes do not"
    train(copied)
    with pytest.raises(CheckpointError, match=r"no row of the weights of .*; rows: tiny, out"):
        row_of(found, path, copied)
    assert row_of(found, path, copied, "out") == "out", "a label stands for the files' bytes"
    with pytest.raises(CheckpointError, match="no row tiny of the fingerprint"):
        row_of(found, path, copied, "tiny")


def test_trained_weights_do_not_get_the_scores_of_the_untrained(folder: Path, tmp_path: Path):
    """Headers, and so fingerprints, are equal."""
    trained = Path(shutil.copytree(folder, tmp_path / "trained", copy_function=shutil.copyfile))
    train(trained)
    assert open_checkpoint(trained).fingerprint() == open_checkpoint(folder).fingerprint()
    found = evaluation(scored(folder))
    path = write(found, tmp_path / "scores", folder)
    with pytest.raises(CheckpointError, match="no row of the weights"):
        row_of(found, path, trained)
    for text in ("[", "{}", '{"run": {"files": 3}}', '{"run": 1}'):
        (path.parent / found.scores[0].file).write_text(text)
        with pytest.raises(CheckpointError, match="no row of the weights"):
            row_of(found, path, folder)


def test_a_recipe_that_was_applied_on_the_way(folder: Path, tmp_path: Path):
    run = report_of(folder).run
    row = ScoredModel("tiny+full", "tiny", None, run["source"], run["recipe"], "tiny", "auto")
    stock = replace(row, label="tiny", recipe=None)
    other = replace(row, label="tiny+other", recipe={**run["recipe"], "gamma": 0.5})
    found = evaluation(stock, row, other)
    path = write(found, tmp_path / "scores", None)
    with pytest.raises(CheckpointError, match="no row of the weights"):
        row_of(found, path, folder)  # other weights have such headers too
    scored_one = Path(shutil.copytree(folder, path.parent / "models" / "tiny+full"))
    assert row_of(found, path, folder) == "tiny+full"
    train(scored_one)
    with pytest.raises(CheckpointError, match="no row of the weights"):
        row_of(found, path, folder)
    assert row_of(found, path, folder, "tiny+full") == "tiny+full"
    pinned = evaluation(stock, replace(row, commit="c" * 40), other)
    assert row_of(pinned, path, folder) == "tiny+full"
    twice = evaluation(replace(row, commit="c" * 40), replace(row, commit="c" * 40, label="again"))
    with pytest.raises(UsageError, match=r"several rows are of .*: tiny\+full, again; --eval-label says which"):
        row_of(twice, path, folder)
    trained = replace(report_of(folder), training={"steps": 1})
    (folder / "namex/report.json").write_text(trained.to_json())
    with pytest.raises(CheckpointError, match="no row of the weights"):
        row_of(pinned, path, folder)


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"run": {}, "models": [], "scores": [{"a": 1}]}', "\udcff"])
def test_files_that_are_no_report(tmp_path: Path, text: str):
    (tmp_path / "report.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"no report of zero_shot\.py"):
        read_evaluation(tmp_path / "report.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"value": "high"},
        {"value": math.nan},
        {"items": "many"},
        {"stderr": []},
        {"data": {"dataset": "json"}},
        {"data": {"dataset": "json", "config": {}, "split": "test"}},
    ],
)
def test_scores_that_no_card_can_show(folder: Path, tmp_path: Path, changes: dict[str, Any]):
    path = tmp_path / "report.json"
    path.write_text(evaluation(scored(folder), scores=[score("out")]).to_json())
    assert read_evaluation(path).scores == [score("out")]
    path.write_text(evaluation(scored(folder), scores=[score("out", **changes)]).to_json())
    with pytest.raises(CheckpointError, match=r"no report of zero_shot\.py"):
        read_evaluation(path)


def test_the_card_shows_the_scores(folder: Path):
    apart = paired([1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    scores = [
        score("out", baseline="tiny", difference=apart),
        score("out", "a|b<i>", metric="bits", filter="strict", value=1.5, stderr=None, num_fewshot=5),
        score("tiny"),
    ]
    found = evaluation(replace(scored(folder), original="tiny"), scores=scores)
    card = (folder / "README.md").read_text()
    text = with_scores(card, found, "out", "name")
    assert with_scores(text, found, "out", "name") == text
    assert text.index("## Scores") < text.index("## Recipe")
    assert f"| sums | acc | 300 | 75.00 ± 2.50 | +0.00 ± {100 * apart.stderr:.2f} |" in text
    assert "| score | difference to the original |" in text
    unmerged = replace(found, scores=[replace(scores[0], baseline="tiny+cosine-smoe"), *scores[1:]])
    told = with_scores(card, unmerged, "out", "name")
    assert "| score | difference to the same router without merging |" in told
    assert "| a&#124;b&#60;i&#62;, 5 examples | bits, strict | 300 | 1.5000 |  |" in text
    results = ModelCard(text).data.eval_results
    assert [(one.dataset_name, one.metric_value) for one in results] == [("sums", 0.75), ("a|b<i>", 1.5)]
    assert results[0].metric_args["stderr"] == 0.025
    assert ModelCard(text).data.tags == ModelCard(card).data.tags
    few = replace(found, run={**found.run, "limit": 20}, scores=[score("out")])
    assert "the first 20 items of each task only" in with_scores(card, few, "out", "name")
    assert "difference" not in with_scores(card, few, "out", "name")


def test_scores_are_pushed(hub: Hub, online: Command, folder: Path, tmp_path: Path):
    found = evaluation(scored(folder))
    path = write(found, tmp_path / "scores", folder)
    before = (folder / "README.md").read_bytes()
    hub.users["hf_0123456789"] = "me"
    online("token", "hf_0123456789")
    wrong = online("namex-push", folder, "--repo", "me/scored", "--quiet", "--eval", path, "--eval-label", "b")
    assert_refused(wrong, "no row b of the fingerprint")
    answer = online("namex-push", folder, "--repo", "me/scored", "--quiet", "--eval", path)
    online("token")
    assert answer.status == 0, answer
    data = ModelCard.load(hub.folders["me/scored"] / "README.md").data
    assert (data.model_name, data.eval_results[0].metric_value) == ("scored", 0.75)
    assert (folder / "README.md").read_bytes() == before


GSM8K = {
    "data": {"dataset": "openai/gsm8k", "config": "main", "split": "test"},
    "metric": "exact_match",
    "filter": "strict-match",
    "items": 1319,
}


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("namex_sums", {}),
        ("gsm8k", {"data": {"dataset": "json", "config": None, "split": "test"}}),
        ("gsm8k", {"items": 200}),
        ("gsm8k", {"filter": "flexible-extract"}),
        ("mmlu_pro_law", {"data": {"dataset": "TIGER-Lab/MMLU-Pro", "config": None, "split": "test"}}),
        ("gsm8k", {"model": "tiny"}),
    ],
    ids=["own set", "files of that name", "first items", "second filter", "a part", "other model"],
)
def test_what_is_no_score_of_a_benchmark_goes_on_no_leaderboard(folder: Path, task: str, changes: dict[str, Any]):
    found = evaluation(scored(folder), scores=[score("out", "gsm8k", **GSM8K), score("out", task, **GSM8K | changes)])
    assert list(benchmark_files(found, "out")) == [".eval_results/gsm8k-0shot.yaml"]
    assert benchmark_files(replace(found, scores=found.scores[1:]), "out") == {}


def test_scores_of_benchmarks_are_pushed_for_leaderboards(hub: Hub, online: Command, folder: Path, tmp_path: Path):
    """Files that another push brought go; files of others stay."""
    scores = [score("out"), score("out", "gsm8k", **GSM8K), score("out", "gsm8k", **GSM8K, num_fewshot=5, value=0.4116)]
    path = write(evaluation(scored(folder), scores=scores), tmp_path / "scores", folder)
    hub.users["hf_0123456789"] = "me"
    online("token", "hf_0123456789")
    push = ("namex-push", folder, "--repo", "me/ranked")
    answer = online(*push, "--eval", path)
    assert answer.status == 0, answer
    assert ".eval_results/gsm8k-5shot.yaml" in answer.err
    there = {name: text for name, text in hub.files("me/ranked").items() if name.startswith(".eval_results/")}
    assert there.keys() == {".eval_results/gsm8k-0shot.yaml", ".eval_results/gsm8k-5shot.yaml"}
    (entry,) = parse_eval_result_entries(yaml.safe_load(there[".eval_results/gsm8k-5shot.yaml"].read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 41.16)
    assert (entry.source_name, entry.notes) == ("lm-eval 0.4.13", "gsm8k, 5-shot, exact_match (strict-match)")
    (hub.folders["me/ranked"] / ".eval_results/hle.yaml").write_text("mine")
    answer = online(*push, "--quiet")
    online("token")
    assert answer.status == 0, answer
    assert [name for name in hub.files("me/ranked") if name.startswith(".eval")] == [".eval_results/hle.yaml"]
    assert not (folder / ".eval_results").exists()
