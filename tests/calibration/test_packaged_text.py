"""The packaged calibration text shares nothing with the packaged held-out text that a score could gain by."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from namex_hf.calibration.sources import PACKAGED
from namex_hf.evaluation.arithmetic import held_out_problems
from namex_hf.evaluation.perplexity import held_out_texts

GENERATOR = Path(__file__).parents[2] / "namex_hf" / "evaluation" / "problems" / "templates.py"
TEXTS = {path.stem: path.read_text("utf-8") for path in PACKAGED.glob("*.txt")}
CHATS = [json.loads(line)["messages"] for line in (PACKAGED / "chat.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packaged_arithmetic", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held_out_lines() -> Iterator[str]:
    """What is long enough to be nobody else's by chance."""
    for text in held_out_texts().values():
        yield from (line.strip() for line in text.splitlines() if len(line.strip()) > 60)
    for problem in held_out_problems():
        yield problem["question"]


def test_domains_and_sizes():
    assert set(TEXTS) == set(held_out_texts())
    for text in TEXTS.values():
        assert 250_000 < len(text.encode()) <= 260_001
    assert 250_000 < (PACKAGED / "chat.jsonl").stat().st_size <= 260_000
    for chat in CHATS:
        assert [turn["role"] for turn in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert all(turn["content"] for turn in chat)


@pytest.mark.parametrize(
    ("domain", "shared"),
    [
        ("prose", 0),
        ("dictionary", 0),
        ("arithmetic", 0),
        ("chat", 0),
        ("code", 2),  # the rule for leap years, and a ruler
        ("manual", 14),  # the note to editors in every "What's New", and two stock sentences
    ],
)
def test_no_held_out_line_but_boilerplate(domain: str, shared: int):
    said = TEXTS[domain] if domain != "chat" else "\n".join(turn["content"] for chat in CHATS for turn in chat)
    lines = {line.strip() for line in said.splitlines()}
    found = [line for line in set(held_out_lines()) if line in lines]
    assert len(found) == shared, found


def test_word_problems_have_the_operands_of_training(generator: ModuleType):
    known = {f"Question: {q}\nAnswer: {a}" for q, a in generator.problems(60_000, seed=1, held_out=False)}
    assert set(TEXTS["arithmetic"].strip().split("\n\n")) <= known
    known = {answer for _, answer in generator.problems(12_000, seed=3, held_out=False)}
    asked = [chat[1]["content"] for chat in CHATS if "####" in chat[1]["content"]]
    assert len(asked) > 400
    assert set(asked) <= known
