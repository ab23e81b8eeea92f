"""Packaged sets and text."""

import json
from pathlib import Path

from namex_hf.calibration.sources import PACKAGED as CALIBRATION
from namex_hf.harness.tasks import chosen
from namex_hf.harness.text import pieces

from .conftest import TASKS


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / "data" / f"{name}_test.jsonl").read_text("utf-8").splitlines()]


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
        (task,) = chosen([], [path])
        digests.add(task.digest)
    assert len(digests) == 2
    (zero,), (two,) = (chosen(["namex_word_problems"], include=TASKS, num_fewshot=n) for n in (0, 2))
    assert zero.digest != two.digest
