"""Texts that a caller hands over: the same ids as of files with the same content, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from namex_hf.calibration.sources import PACKAGED, check_texts
from namex_hf.calibration.text import calibration_text
from namex_hf.errors import CalibrationError


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Twenty packaged chats, and five texts."""
    lines = (PACKAGED / "chat.jsonl").read_text("utf-8").splitlines()[:20]
    prose = (PACKAGED / "prose.txt").read_text("utf-8").splitlines()[:500]
    return [json.loads(line) for line in lines] + [{"text": "\n".join(prose[n::5])} for n in range(5)]


@pytest.mark.parametrize("seed", [0, 1])
def test_they_say_what_a_file_of_them_says(tiny: Any, records: list[dict[str, Any]], tmp_path: Path, seed: int):
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    wanted = calibration_text(str(tmp_path / "all.jsonl"), tiny, 4096, 64, seed)
    texts = [record.get("messages", record.get("text")) for record in records]
    found = calibration_text(check_texts(tuple(texts)), tiny, 4096, 64, seed)
    assert found.ids.equal(wanted.ids)
    assert (found.sha256, found.name, wanted.name) == (wanted.sha256, "own texts", "all.jsonl")
    assert found.sources.unique().tolist() == [0]


def test_any_iterable_is_read_once():
    assert check_texts(str(number) for number in range(3)) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ("one text", r"texts is one text; accepted: a list of texts and chats"),
        (["a", 3], r"texts\[1\] is int; accepted: text, or a list of messages"),
        ([{"role": "user", "content": "a"}], r"texts\[0\] is dict; accepted: text, or a list of messages"),
        ([["a"]], r"texts\[0\]: the tokenizer's chat template refuses it"),
        (["\ud800"], r"texts\[0\] is not text: surrogates not allowed"),
        ([], r"calibration data own texts has 0 tokens of text; a sequence needs 8"),
        (["and"], r"calibration data own texts has 2 tokens of text; a sequence needs 8"),
    ],
)
def test_what_is_refused(tiny: Any, texts: Any, says: str):
    with pytest.raises(CalibrationError, match=says):
        calibration_text(check_texts(texts), tiny, 100, 8, seed=0)


def test_a_chat_needs_a_chat_template(letters: Any):
    with pytest.raises(CalibrationError, match=r"texts\[0\] is a chat, and the tokenizer has no chat template"):
        calibration_text([[{"role": "user", "content": "a"}]], letters, 100, 8, seed=0)
