"""Chats with a model's own answers: whose turns they hold, how a file goes on, and that a patch reads them."""

import json
from pathlib import Path
from typing import Any

import pytest

from namex_hf.calibration.chats import PACKAGED, read_chats
from namex_hf.calibration.text import calibration_text
from namex_hf.checkpoint.resolve import local_folder
from namex_hf.commands import answers as command
from namex_hf.errors import CalibrationError, OutputError
from namex_hf.evaluation import own_answers
from namex_hf.evaluation.generation import as_chat, generated_answers
from namex_hf.evaluation.loading import load, tokenizer_of
from namex_hf.evaluation.own_answers import AnswerChoices, AnswerFile, write_answers

Said = pytest.CaptureFixture[str]
FEW = ("--answer-tokens", "8", "--tokens", "200", "--batch", "2", "--quiet", "--device", "cpu")
TINY = local_folder("tiny")
assert TINY is not None


def ran(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model() -> Any:
    return load(TINY, "auto")


@pytest.fixture
def tokenizer() -> Any:
    return tokenizer_of(TINY)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one turn, of two with a system's, and one in which no assistant answers."""
    user, assistant = ({"role": role, "content": f"{role} says"} for role in ("user", "assistant"))
    system = {"role": "system", "content": "Be short."}
    each = [[user, assistant], [system, user, assistant, user, assistant, user], [user], *[[user, assistant]] * 5]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in each))
    return path


@pytest.fixture(scope="module")
def written(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    assert ran("tiny", "--out", out, "--chats", chats, *FEW) == 0
    return out


def chats_in(path: Path) -> list[Any]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def test_the_turns_of_others_stay_and_the_answers_are_the_models(
    written: Path, chats: Path, model: Any, tokenizer: Any
) -> None:
    """Greedy, each after what was said before it: its own earlier answers, not those of the set."""
    found, asked = chats_in(written), read_chats(str(chats))
    assert len(asked) == 7
    assert len(found) >= 4
    for own, given in zip(found, asked, strict=False):
        assert [turn["role"] for turn in own] == [turn["role"] for turn in given]
        for place, turn in enumerate(own):
            if turn["role"] != "assistant":
                assert turn == given[place]
                continue
            prompt = as_chat(tokenizer, [(one["role"], one["content"]) for one in own[:place]])
            (answer,) = generated_answers(model, tokenizer, [prompt], 8, chat=True)
            assert turn["content"] == answer.text != given[place]["content"]


def test_a_stopped_run_goes_on_to_the_same_file(
    written: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not answered again; half a batch and half a line are."""
    whole, calls = written.read_bytes(), []
    lines = whole.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    real = own_answers.own_answers
    monkeypatch.setattr(own_answers, "own_answers", lambda *given: calls.append(given[-1]) or real(*given))
    assert ran("tiny", "--out", tmp_path / "a.jsonl", "--chats", chats, *FEW) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    assert calls[0] == 2
    calls.clear()
    assert ran("tiny", "--out", tmp_path / "a.jsonl", "--chats", chats, *FEW) == 0
    assert calls == []


def test_drawn_answers_follow_the_seed(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    asked = [[{"role": "user", "content": "Tell me of the sea."}, {"role": "assistant", "content": ""}]] * 2
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        file = AnswerFile(tmp_path / f"{name}.jsonl", AnswerChoices("m", "c", 12, 1.0, seed, 1))
        assert write_answers(model, tokenizer, asked, file, 10**6) > 0
        files.append(chats_in(file.path))
    assert files[0] == files[1] != files[2]
    assert files[0][0] != files[0][1]


def test_a_chat_ends_where_the_context_does(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    user, assistant = {"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four"}
    chat, choices = [user, assistant] * 3, AnswerChoices("", "", 8, None, 0, 2)
    whole, _ = own_answers.own_answers(model, tokenizer, [chat, [user, assistant]], choices)
    second = len(tokenizer(as_chat(tokenizer, [(one["role"], one["content"]) for one in whole[:3]])).input_ids)
    monkeypatch.setattr(model.config, "max_position_embeddings", second + 8 + 5)  # the third prompt is longer
    cut, short = own_answers.own_answers(model, tokenizer, [chat, [user, assistant]], choices)
    assert cut == whole[:5]
    assert short == whole[:2]


def test_they_are_calibration_text(written: Path, tokenizer: Any) -> None:
    text = calibration_text(str(written), tokenizer, tokens=64, length=16, seed=0)
    assert (text.name, text.tokens) == ("answers.jsonl", 64)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("--tokens", 0), "--tokens 0: accepted: numbers from 1"),
        (("--answer-tokens", 20000), "--answer-tokens 20000: accepted: at most 16384"),
        (("--answer-tokens", 1024), "--answer-tokens 1024: tiny was made for 1024 tokens"),
        (("--temperature", 0), "--temperature 0.0: accepted: numbers above 0"),
        (("--chats", "nowhere.jsonl"), "chats nowhere.jsonl: accepted: packaged, a .jsonl file"),
    ],
)
def test_what_is_refused(tmp_path: Path, capsys: Said, wrong: tuple[str, object], says: str) -> None:
    assert ran("tiny", "--out", tmp_path / "a.jsonl", *wrong) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def test_a_file_of_other_choices_is_not_continued(written: Path, chats: Path, capsys: Said) -> None:
    before = written.read_bytes()
    assert ran("tiny", "--out", written, "--chats", chats, *FEW, "--temperature", 1) == 2
    assert "is of another model, other chats or other choices" in capsys.readouterr().err
    assert written.read_bytes() == before
    (written.parent / "b.jsonl").write_text("no json\n")
    with pytest.raises(OutputError, match="line 1"):
        AnswerFile(written.parent / "b.jsonl", AnswerChoices("", "", 1, None, 0, 1)).read(1)


def test_a_file_of_others_is_not_overwritten(chats: Path, tmp_path: Path, capsys: Said) -> None:
    own = tmp_path / "own.jsonl"
    own.write_bytes(before := chats.read_bytes())
    assert ran("tiny", "--out", own, "--chats", chats, *FEW, "--overwrite") == 2
    assert "is no file of namex answers" in capsys.readouterr().err
    assert own.read_bytes() == before


def test_records_of_another_form_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(CalibrationError, match="record 1: accepted: a list of 'messages'"):
        read_chats(str(tmp_path / "a.jsonl"))


def test_the_packaged_chats_all_end_with_an_answer() -> None:
    found = read_chats("packaged")
    assert len(found) == len(PACKAGED.read_text().splitlines())
    assert all(chat[-1]["role"] == "assistant" for chat in found)
