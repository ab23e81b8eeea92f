"""Packaged sets and text."""

import json
from pathlib import Path

import pytest

from namex_hf.calibration.sources import PACKAGED as CALIBRATION
from namex_hf.errors import TaskError
from namex_hf.evaluation.tasks import in_full, load_tasks
from namex_hf.evaluation.text_task import pieces
from tests.helpers.zero_shot import TASKS


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / "data" / f"{name}_test.jsonl").read_text("utf-8").splitlines()]


def test_a_short_name_is_all_its_tasks_with_the_same_examples() -> None:
    assert in_full(["gsm8k:5", "arc:25", "arc"]) == [
        *("gsm8k:5", "arc_challenge:25", "arc_easy:25", "arc_challenge", "arc_easy"),
    ]


def test_pieces_lose_nothing_but_blanks() -> None:
    text = "one\n\n" + "two " * 300 + "\n \nthree\n\n\nfour\n"
    found = pieces(text, 500)
    assert len(found) == 2
    assert found[1] == "three\n\nfour"
    assert "".join("\n".join(found).split()) == "".join(text.split())
    assert pieces("\n \n") == []


def test_choices_are_four_and_one_is_right() -> None:
    for name in ("definitions", "sums"):
        items = lines(name)
        assert len(items) == 300
        assert all(len(set(item["choices"])) == 4 and 0 <= item["answer"] < 4 for item in items)
        places = [sum(item["answer"] == place for item in items) for place in range(4)]
        assert min(places) > 45  # nothing is to be had by always saying one letter
    for item in lines("sums"):
        left, right = item["context"].rsplit("<<", 1)[1][:-1], item["choices"][item["answer"]]
        assert eval(left.replace("/", "//")) == int(right)


def test_nothing_of_it_is_in_calibration_text() -> None:
    text = "\n".join(path.read_text("utf-8") for path in CALIBRATION.iterdir())
    for item in lines("definitions"):
        assert f"{item['context']} {item['choices'][item['answer']]}" not in text
    for item in lines("sums"):
        assert item["context"].removeprefix("Question: ").split("\n")[0] not in text


def test_other_documents_are_another_task(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    digests = set()
    for content in ("One text.", "Another text.", "One text."):
        path.write_text(content)
        (task,) = load_tasks([], [path])
        digests.add(task.digest)
    assert len(digests) == 2
    (zero,), (two,) = (load_tasks(["namex_word_problems"], include=TASKS, num_fewshot=n) for n in (0, 2))
    assert zero.digest != two.digest


def test_shots_by_task() -> None:
    """Each task has its own number; the default's tasks the common one; the same task may come twice."""
    names = ["namex_word_problems:2", "namex_sums", "namex_word_problems:0", "namex_sums:1", "namex_text"]
    found = load_tasks(names, include=TASKS, num_fewshot=1)
    assert [(one.name, one.label, one.shots) for one in found] == [
        ("namex_word_problems", "namex_word_problems-2shot", 2),
        ("namex_sums", "namex_sums", 1),
        ("namex_word_problems", "namex_word_problems-0shot", 0),
        ("namex_text", "namex_text", 0),  # text is scored as it stands
    ]
    assert [task.config.num_fewshot for one in found for task in one.tasks.values()] == [2, 1, 0, 0]
    assert len({one.digest for one in found}) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("namex_sums:five", r"task namex_sums:five: 'five'; accepted: TASK, or TASK:N .* such as namex_sums:5"),
        ("namex_sums:-1", "'-1'; accepted: TASK, or TASK:N"),
        ("namex_sums:", "''; accepted: TASK, or TASK:N"),
        ("namex_text:5", "task namex_text:5 takes no examples; accepted: namex_text"),
        ("namex_sums:5000", r"task namex_sums: 5000 worked examples are asked for; its data have \d+$"),
    ],
)
def test_shots_that_a_task_cannot_have(name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_tasks([name], include=TASKS)
