"""The paper's numbers, and what a report says in words."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import Qwen2MoeConfig

from namex_hf.evaluation.paper import Paper
from namex_hf.evaluation.statistics import paired
from namex_hf.evaluation.zero_shot_report import (
    Score,
    ScoredModel,
    ZeroShotReport,
    eval_results,
    markdown,
    sentence,
    table,
)
from namex_hf.models import DeepseekConfig
from namex_hf.recipe import read_yaml
from tests.helpers.zero_shot import ROOT

DATA = ("dataset", "config", "split")
TABLES = ROOT / "eval" / "paper_tables.json"
QWEN = {**Qwen2MoeConfig().to_dict(), "model_type": "qwen2_moe", "num_hidden_layers": 24, "hidden_size": 2048}
DEEPSEEK = {**DeepseekConfig().to_dict(), "model_type": "namex_deepseek", "num_hidden_layers": 28, "hidden_size": 2048}


@pytest.mark.parametrize(
    ("config", "recipe", "task", "stage", "value", "original"),
    [
        (QWEN, None, "mmlu", "zero-shot", 61.28, 61.28),
        (QWEN, {"method": "ep-camex", "merge": "residual"}, "gsm8k", "zero-shot", 60.23, 60.12),
        (QWEN, {"method": "namex-full", "routing": "cosine"}, "arc_challenge", "zero-shot", 50.93, 50.6),
        (QWEN, {"method": "namex-full", "disagreement": "mean"}, "arc_easy", "fine-tuned", 51.25, 51.12),
        (DEEPSEEK, {"method": "smoe", "routing": "stable"}, "gsm8k", "zero-shot", 17.5, 17.5),
        (DEEPSEEK, {"method": "namex-full"}, "mmlu", "fine-tuned", 45.47, 45.21),
        (DEEPSEEK, {"solver": "ccp"}, "mmlu", "zero-shot", 44.92, 44.77),
        (DEEPSEEK, {"merge": "soft", "routing": "stable", "seed": 3}, "mmlu", "zero-shot", 45.95, 45.8),
    ],
)
def test_the_papers_number(config, recipe, task, stage, value, original) -> None:
    found = Paper(TABLES, stage).score(config, recipe, task)
    assert found is not None
    assert (found.value, found.original) == (value, original)


ROUTINGS = {"linear": "Linear", "cosine": "Cosine", "stable": "Stable-MoE"}


def test_the_recipes_of_the_papers_rows_get_their_numbers() -> None:
    """Each file of `patches` for DeepSeek that names Table 4, with the base of its rows; `soft` is eq. 9 itself."""
    table = json.loads(TABLES.read_text())["tables"]["4"]["rows"]
    found, files = [], sorted((ROOT / "patches" / "deepseek-moe-16b").glob("*.yaml"))
    for file in files:
        fields = {name: value for name, value in read_yaml(file).items() if name != "base"}
        score = Paper(TABLES).score(DEEPSEEK, fields, "mmlu")
        assert (score is not None) == ("Table 4" in file.read_text() or fields["merge"] == "soft"), file
        if score is not None and fields["merge"] != "soft":
            found.append((ROUTINGS[fields["routing"]], score.value, score.original))
    originals = {row["router"]: row["values"][0] for row in table if row["model"] == "Deepseek-MoE"}
    assert sorted(found) == sorted((row["router"], row["values"][0], originals[row["router"]]) for row in table)


def test_the_first_layer_has_two_published_readings() -> None:
    merged, sparse = (Paper(TABLES).score(QWEN, {"first_layer": first}, "mmlu") for first in ("merged", "sparse"))
    assert merged is not None
    assert merged == sparse


@pytest.mark.parametrize(
    ("config", "recipe", "task"),
    [
        ({**QWEN, "hidden_size": 128}, None, "mmlu"),
        (QWEN, {"method": "namex-full", "merge": "grouped"}, "mmlu"),
        (QWEN, {"method": "namex-full", "momentum": "complex"}, "mmlu"),
        (QWEN, {"method": "camex"}, "mmlu"),
        (QWEN, {"method": "namex"}, "mmlu"),
        (QWEN, {"every": 5}, "mmlu"),
        (QWEN, {"scale": "lemma", "gamma": 3.0}, "mmlu"),
        (QWEN, {"method": "ep-camex", "gamma": 2.0}, "mmlu"),
        (QWEN, {"base": "first"}, "mmlu"),
        (QWEN, {"granularity": "expert"}, "mmlu"),
        (QWEN, {"solver": "ccp", "ccp_iterations": 20}, "mmlu"),
        (QWEN, {"merge": "soft", "eta": 0.5}, "mmlu"),
        (QWEN, {"merge": "soft", "curvature": "kronecker"}, "mmlu"),
        (QWEN, {"a field of another release": 1}, "mmlu"),
        (QWEN, None, "hellaswag"),
        ({"model_type": "llama", "num_hidden_layers": 24, "hidden_size": 2048}, None, "mmlu"),
    ],
)
def test_the_paper_has_no_such_number(config, recipe, task) -> None:
    assert Paper(TABLES).score(config, recipe, task) is None


def report(new: list[float], old: list[float], metric: str = "acc", higher_is_better: bool = True) -> ZeroShotReport:
    paper = Paper(TABLES).score(QWEN, {"method": "namex-full"}, "mmlu")
    data = {"dataset": "cais/mmlu", "config": "all", "split": "test"}
    scores = [
        Score("a", "mmlu", metric, "none", sum(old) / len(old), 0.01, len(old), 0, higher_is_better, data, "a/r.json"),
        Score(
            *("b", "mmlu", metric, "none", sum(new) / len(new), 0.01, len(new), 0, higher_is_better, data, "b/r.json"),
            *("a", paired(new, old), paper),
        ),
    ]
    models = [
        ScoredModel("a", "Qwen/a", "c0ffee", "f", None, None, "auto"),
        ScoredModel("b", "Qwen/a", "c0ffee", "f", {"method": "namex-full", "merge": "residual"}, "a", "auto"),
    ]
    versions = {"lm_eval": "0", "namex_hf": "0"}
    run = {"limit": None, "num_fewshot": 0, "seed": 1, "dtype": "auto", "device": "cpu", "stage": "zero-shot"}
    return ZeroShotReport({**run, "versions": versions}, models, scores)


def test_a_difference_within_the_noise_is_called_so() -> None:
    made = report([1, 1, 0, 1] * 20, [1, 0, 1, 1] * 20)
    text = markdown(made)
    assert "b, acc: +0.00 points to a is within the noise: no difference is shown on 80 items" in text
    assert "| b | residual | linear | namex-full | zero | 0 | acc | 75.00 ± 1.00 | +0.00 ±" in text
    assert "| 61.87 | +0.59 |" in text
    assert "Paper: Table 17 (zero-shot)" in text
    assert "`a/r.json`, `b/r.json`" in text
    assert "c0ffee" in text


def test_a_difference_that_is_more() -> None:
    made = report([1.0] * 40 + [0.0] * 40, [0.0] * 80)
    assert "b, acc: +50.00 points to a is more than noise: better on 80 items (40 better, 0 worse; p <0.001)" in str(
        sentence(made.scores[1])
    )
    losses = report([1.5 + i / 100 for i in range(20)], [1 + i / 90 for i in range(20)], "bits_per_byte", False)
    assert "is more than noise: worse on 20 items (0 better, 20 worse" in str(sentence(losses.scores[1]))
    assert sentence(made.scores[0]) is None


def test_the_report_survives_its_file() -> None:
    made = report([1, 0, 1], [0, 0, 1])
    assert ZeroShotReport.from_json(made.to_json()) == made
    assert json.loads(made.to_json())["scores"][1]["difference"]["test"] == "mcnemar"
    assert "the first 3 items of every task only" in markdown(replace(made, run={**made.run, "limit": 3}))


def test_rows_name_their_shots() -> None:
    """One task without examples and with five, one table; a group of both kinds of task."""
    made = report([1, 0, 1], [0, 0, 1])
    five = [replace(score, num_fewshot=5) for score in made.scores]
    both = replace(made, scores=[*made.scores, *five, replace(made.scores[0], num_fewshot=None)])
    titles, rows = table(both, "mmlu")
    place = titles.index("shots")
    assert [(row[0], row[place]) for row in rows] == [("a", "0"), ("b", "0"), ("a", "5"), ("b", "5"), ("a", "mixed")]
    assert "b, acc, 5 shots: +33.33 points to a" in markdown(both)
    entries = eval_results(replace(both, scores=both.scores[:4]), "b")
    assert [(one.dataset_name, one.dataset_args) for one in entries] == [
        ("mmlu, 0 shots", {"num_few_shot": 0}),
        ("mmlu, 5 shots", {"num_few_shot": 5}),
    ]
    card = ModelCardData(model_name="b", eval_results=entries)
    assert len(card.to_dict()["model-index"][0]["results"]) == 2  # the Hub would make one entry of equal data


def test_a_difference_says_to_what() -> None:
    """A column of its own where one is not to the model that a row was made of."""
    made = report([1, 0, 1], [0, 0, 1])
    assert "to the original" in table(made, "mmlu")[0]
    smoe = ScoredModel("smoe", "Qwen/a", "c0ffee", "f", {"method": "smoe", "merge": "residual"}, "a", "auto")
    other = replace(made.scores[1], baseline="smoe")
    titles, rows = table(replace(made, models=[*made.models, smoe], scores=[made.scores[0], other]), "mmlu")
    assert "to the original" not in titles
    places = titles.index("difference"), titles.index("to")
    assert [[row[place] for place in places] for row in rows] == [["", ""], [f"{100 / 3:+.2f} ± {100 / 3:.2f}", "smoe"]]
    assert {len(row) for row in rows} == {len(titles)}


@pytest.mark.parametrize(
    ("of_task", "types"),
    [
        ({"a": ("json", None, "test"), "b": ("json", None, "test")}, {"a": "a", "b": "b"}),
        ({"a": ("json", None, "test")}, {"a": "a"}),
        ({"gsm8k": ("openai/gsm8k", "main", "test")}, {"gsm8k": "openai/gsm8k"}),
        (
            {"gsm8k": ("openai/gsm8k", "main", "test"), "gsm8k_cot": ("openai/gsm8k", "main", "test")},
            {"gsm8k": "gsm8k", "gsm8k_cot": "gsm8k_cot"},
        ),
        (
            {"arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"), "arc_hard": ("allenai/ai2_arc", "ARC-Hard", "test")},
            {"arc_easy": "allenai/ai2_arc", "arc_hard": "allenai/ai2_arc"},
        ),
    ],
    ids=["plain files", "one plain file", "a data set", "shared", "two configurations"],
)
def test_every_task_is_an_entry_of_its_own(of_task: dict[str, tuple[str, str | None, str]], types: dict[str, str]):
    """There and back through a card's metadata: two metrics a task, all under the task's name."""
    scores = [
        Score("a", task, metric, "none", 0.5, 0.1, 4, 0, True, dict(zip(DATA, data, strict=True)), "a/r.json")
        for task, data in of_task.items()
        for metric in ("acc", "acc_norm")
    ]
    made = replace(report([1, 0], [0, 0]), scores=[*scores, replace(scores[0], model="b", task="another")])
    card = ModelCardData(model_name="a", eval_results=eval_results(made, "a"))
    _, found = model_index_to_eval_results(card.to_dict()["model-index"])
    assert {one.dataset_name: one.dataset_type for one in found} == types
    assert [(one.dataset_name, one.metric_type) for one in found] == [(one.task, one.metric) for one in scores]
