"""lm-eval's official multiple-choice tasks, and a group of them, on local copies made of our own word problems."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from namex_hf.evaluation.zero_shot_report import ZeroShotReport
from tests.helpers.commands import Command
from tests.helpers.zero_shot import TASKS, recipe

SUBJECTS = (  # of the group mmlu_stem, as lm-eval 0.4.13 lists them
    *("abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry", "college_computer_science"),
    *("college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering"),
    *("elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science"),
    *("high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning"),
)


def data_set(folder: Path, configs: dict[str, dict[str, list[dict]]]) -> None:
    """Parquet files and the block of the README that names them."""
    listed = []
    for config, splits in configs.items():
        (folder / config).mkdir(parents=True)
        for split, rows in splits.items():
            Dataset.from_list(rows).to_parquet(folder / config / f"{split}.parquet")
        files = [{"split": split, "path": f"{config}/{split}.parquet"} for split in splits]
        listed.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    items = [json.loads(line) for line in (TASKS / "data" / "sums_test.jsonl").read_text().splitlines()]
    mmlu = [{"question": i["context"], "choices": i["choices"], "answer": i["answer"], "subject": "s"} for i in items]
    data_set(
        tmp_path / "data" / "cais" / "mmlu",
        {  # one more item in every other subject: the group's score is a mean over items, not over subjects
            subject: {"test": mmlu[3 * n : 3 * n + 2 + n % 2], "dev": mmlu[-5:]} for n, subject in enumerate(SUBJECTS)
        },
    )
    arc = [
        {
            "id": str(n),
            "question": i["context"],
            "choices": {"text": i["choices"], "label": list("ABCD")},
            "answerKey": "ABCD"[i["answer"]],
        }
        for n, i in enumerate(items[:8])
    ]
    splits = {"train": arc[:2], "validation": arc[2:4], "test": arc[4:]}
    data_set(tmp_path / "data" / "allenai" / "ai2_arc", {"ARC-Easy": splits, "ARC-Challenge": splits})
    return tmp_path / "data"


def test_a_group_is_compared_over_all_its_items(zero_shot: Command, data: Path, tmp_path: Path) -> None:
    answer = zero_shot(
        *("--models", "tiny", "--recipe", recipe(tmp_path, "half", merge="grouped", experts=4)),
        *("--tasks", "mmlu_stem,arc_easy,arc_challenge", "--data", data, "--output_path", tmp_path / "out"),
    )
    assert answer.status == 0, answer.err
    report = ZeroShotReport.from_json((tmp_path / "out" / "report.json").read_text())
    scores = [score for score in report.scores if score.model == "tiny+half"]
    assert [(s.task, s.metric) for s in scores] == [
        ("mmlu_stem", "acc"),
        *(("arc_easy", metric) for metric in ("acc", "acc_norm")),
        *(("arc_challenge", metric) for metric in ("acc", "acc_norm")),
    ]
    group = scores[0]
    assert group.items == 19 * 2 + 9
    assert group.difference is not None
    original = next(score for score in report.scores if score.model == "tiny" and score.task == "mmlu_stem")
    assert group.difference.mean == pytest.approx(group.value - original.value)
    assert all(score.difference is not None for score in scores)
