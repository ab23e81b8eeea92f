"""Chats: what is read, what is refused with its place, what is held back, and what is told of their lengths."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from namex_hf.checkpoint.resolve import PACKAGED as MODELS
from namex_hf.errors import MissingExtraError, TrainingError
from namex_hf.training.chats import (
    PACKAGED,
    ROLES,
    check_template,
    checked,
    file_chats,
    load_chats,
)
from tests.helpers.hub import serving
from tests.helpers.toy_models import toy_tokenizer

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "test")


def chat(number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]
    return {"messages": turns}


def say(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def numbers(chats: Any) -> list[int]:
    return [int(messages[0]["content"].removeprefix("question ")) for messages in chats["messages"]]


@pytest.fixture(scope="module", params=["tiny", "tiny-deepseek"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(MODELS / request.param)


# What is read


def test_the_packaged_chats_are_read_whole():
    files = {name: (PACKAGED / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("train", "held_out")}
    found = load_chats(None, None, SPLITS, held_out=10**6, seed=0)
    assert found.train.to_list() == [json.loads(line) for line in files["train"]]
    assert found.held_out.to_list() == [json.loads(line) for line in files["held_out"]]
    assert len(found.train) > 100 < len(found.held_out)
    assert found.name == "packaged"
    few = load_chats(None, None, SPLITS, held_out=7, seed=0)
    assert few.held_out.to_list() == found.held_out.to_list()[:7]
    assert few.train.to_list() == found.train.to_list()
    assert few.sha256 != found.sha256


def test_the_packaged_chats_that_are_scored_are_none_that_are_trained_on():
    found = load_chats(None, None, SPLITS, held_out=10**6, seed=0)
    trained = {json.dumps(messages) for messages in found.train["messages"]}
    assert not trained & {json.dumps(messages) for messages in found.held_out["messages"]}


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(20, 120), wanted=st.integers(2, 30), seed=st.integers(0, 2**32 - 1))
def test_what_is_held_back_is_disjoint_and_at_most_a_tenth(tmp_path_factory, rows: int, wanted: int, seed: int):
    path = write(tmp_path_factory.mktemp("chats") / "own.jsonl", [chat(number) for number in range(rows)])
    found = load_chats(str(path), None, SPLITS, wanted, seed)
    back, train = numbers(found.held_out), numbers(found.train)
    assert sorted(back + train) == list(range(rows))
    assert len(back) == min(wanted, rows // 10)
    assert back == sorted(back)
    assert train == sorted(train)


def test_what_is_held_back_is_drawn_by_the_seed(tmp_path: Path):
    path = write(tmp_path / "own.jsonl", [chat(number) for number in range(200)])
    draws = [load_chats(str(path), None, SPLITS, 20, seed) for seed in (0, 0, 1)]
    first, again, other = (numbers(found.held_out) for found in draws)
    assert first == again != other
    assert first != list(range(20))
    assert draws[0].sha256 == draws[1].sha256 != draws[2].sha256
    assert [found.name for found in draws] == ["own.jsonl"] * 3


TOOL = {"type": "function", "function": {"name": "add"}}
CALLS = [
    {"role": "user", "content": "How much is 1 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "3", "name": "add"},
    {"role": "assistant", "content": "It is 3.", "reasoning_content": "The tool says 3."},
]
CHILD = """
import json, sys
from namex_hf.errors import TrainingError
from namex_hf.training.chats import load_chats
for name, config, train, test in json.loads(sys.argv[1]):
    try:
        found = load_chats(name, config, (train, test), 4, 0)
        rows = found.train.to_list(), found.held_out.to_list()
        print(json.dumps({"name": found.name, "sha256": found.sha256, "rows": rows}))
    except TrainingError as error:
        print(json.dumps({"error": str(error)}))
"""
ODD: dict[str, tuple[Any, str]] = {
    "null-content": (
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}],
        "turn 2: content is None; accepted: text",
    ),
    "system-alone": (
        [{"role": "system", "content": "You are helpful."}],
        "no turn of the assistant says anything, so there is nothing to learn",
    ),
    "no-turns": ([], "found ['messages', 'source']; needed: 'messages', a list of turns with 'role' and 'content'"),
    "null": (None, "found ['messages', 'source']; needed: 'messages', a list of turns with 'role' and 'content'"),
    "roles": (
        [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "hello"}],
        "turn 1: role 'human'; accepted: system, user, assistant, tool",
    ),
}
"""Turns of one row among good ones, and what is said of it."""
OF_THE_HUB = {
    "me/chats": ("me/chats", None, "train", "test"),
    "a configuration": ("me/chats", "default", "train", "test"),
    "other splits": ("me/chats", None, "test", "train"),
    "no configuration": ("me/chats", "french", "train", "test"),
    "no split": ("me/chats", None, "train", "dev"),
    "no messages": ("me/texts", None, "train", "test"),
    "none": ("me/none", None, "train", "test"),
    "calls": ("me/calls", None, "train", "test"),
    **{f"odd {name}": (f"me/odd-{name}", None, "train", "test") for name in ODD},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Answers about data sets of a Hub on the loopback interface, from a process that knows no other."""
    home = tmp_path_factory.mktemp("home")
    with serving() as found:
        for name in ("chats", "texts"):
            (folder := home / "published" / name).mkdir(parents=True)
            for split, start in (("train", 0), ("test", 100)):
                rows = [{"source": split, **chat(start + number)} for number in range(30)]
                plain = [{"source": split, "text": "a"}]
                write(folder / f"{split}.jsonl", rows if name == "chats" else plain)
            found.add(f"me/{name}", folder)
        calls = [{"source": "x", **chat(0), "tools": None}, {"source": "x", "messages": CALLS, "tools": [TOOL]}]
        odd = {f"odd-{name}": [{"source": "x", "messages": turns}] for name, (turns, _) in ODD.items()}
        for name, rows in {"calls": calls, **odd}.items():
            (folder := home / "published" / name).mkdir(parents=True)
            good = [{"source": "x", **chat(number)} for number in range(20)]
            write(folder / "train.jsonl", [*good, *rows, *good])
            write(folder / "test.jsonl", good)
            found.add(f"me/{name}", folder)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {"HF_HOME": str(home), "HF_ENDPOINT": found.url, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, "-c", CHILD, json.dumps(list(OF_THE_HUB.values()))]
        done = subprocess.run(command, env=kept, cwd=home, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        answers = map(json.loads, done.stdout.splitlines())
        yield {"commit": found.commit("me/chats")} | dict(zip(OF_THE_HUB, answers, strict=True))


def test_a_data_set_of_the_hub(hub: dict[str, Any]):
    train, test = [chat(number) for number in range(30)], [chat(100 + number) for number in range(4)]
    expected = {"name": f"me/chats@{hub['commit']}", "sha256": None, "rows": [train, test]}
    assert hub["me/chats"] == expected
    assert hub["a configuration"] == expected | {"name": f"me/chats:default@{hub['commit']}"}
    turned = [[chat(100 + number) for number in range(30)], [chat(number) for number in range(4)]]
    assert hub["other splits"]["rows"] == turned


@pytest.mark.parametrize(
    ("asked", "start", "inside"),
    [
        ("no configuration", "--dataset_name me/chats cannot be read as a Hub data set: ValueError: ", "french"),
        ("no split", "--dataset_name me/chats cannot be read as a Hub data set: ValueError: ", "dev"),
        ("no messages", "me/texts has the columns source, text; 'messages' is needed", ""),
        ("none", "--dataset_name me/none cannot be read as a Hub data set: RepositoryNotFoundError: ", "404"),
    ],
)
def test_a_data_set_of_the_hub_that_cannot_be_had(hub: dict[str, Any], asked: str, start: str, inside: str):
    said = hub[asked]["error"]
    assert said.startswith(start)
    assert inside in said
    assert "\n" not in said


def test_calls_of_tools_in_a_data_set_of_the_hub(hub: dict[str, Any]):
    """Turns have the fields that they were written with, and the tools are there."""
    train, _ = hub["calls"]["rows"]
    assert train[21] == {"messages": CALLS, "tools": [TOOL]}
    assert train[20] == chat(0) | {"tools": None}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_row_of_the_hub_is_named(hub: dict[str, Any], name: str):
    turn = ", " if ODD[name][1].startswith("turn") else ": "
    assert hub[f"odd {name}"]["error"] == f"me/odd-{name} train row 21{turn}{ODD[name][1]}"


def test_a_parquet_file_says_what_its_lines_say(tmp_path: Path):
    rows = [chat(number) for number in range(30)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"id": n, **row} for n, row in enumerate(rows)]), tmp_path / "own.parquet"
    )
    assert list(file_chats(tmp_path / "own.parquet")) == rows
    write(tmp_path / "own.jsonl", rows)
    found = [load_chats(str(tmp_path / f"own.{suffix}"), None, SPLITS, 3, 5) for suffix in ("parquet", "jsonl")]
    assert found[0].sha256 == found[1].sha256
    assert found[0].train.to_list() == found[1].train.to_list()


def test_chats_of_many_forms(tmp_path: Path):
    """Every role, empty lines, fields beyond the two, a system turn first, a trailing answer, letters of all kinds."""
    turns = [say("system", "be brief"), say("user", "ℵ 𝔄 \n\t"), say("tool", ""), say("assistant", "да")]
    rows = [
        {"messages": [{**turn, "weight": 1, "name": None} for turn in turns], "source": "x"},
        {"messages": [say("assistant", "I begin")]},
        {"messages": [say("assistant", ""), say("user", "?"), say("assistant", "!")]},
    ]
    path = tmp_path / "own.json"
    path.write_text("\n" + "\n  \n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert list(file_chats(path)) == [{"messages": rows[0]["messages"]}, *rows[1:]]
    assert {turn["role"] for turn in turns} == set(ROLES)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
SEARCH = {"type": "function", "function": {"name": "search", "arguments": {"text": "x", "sites": ["y", 2]}}}
TALK = {
    "messages": [
        say("user", "How much is 1 + 2?"),
        {**say("assistant", None), "tool_calls": [CALL, SEARCH]},
        {**say("tool", "3"), "name": "add", "tool_call_id": "c1"},
        {**say("assistant", "It is 3."), "reasoning_content": "The tool says 3."},
        {**say("user", [{"type": "text", "text": "Thanks."}])},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    "chat_template_kwargs": {"enable_thinking": False},
}


def test_what_a_template_may_read_is_as_it_was_written(tmp_path: Path):
    """Neither mixed up with fields of other turns nor with nulls where there was nothing."""
    rows = [chat(number) for number in range(20)]
    rows[3::5] = [TALK] * 4
    path = write(tmp_path / "own.jsonl", [row | {"id": 3} for row in rows])
    found = load_chats(str(path), None, SPLITS, 2, 0)
    assert found.train.column_names == ["messages", "tools", "chat_template_kwargs"]
    read = [*found.train, *found.held_out]
    assert sum(row["messages"] == TALK["messages"] for row in read) == 4
    for row in found.train:
        talk = row["messages"] == TALK["messages"]
        assert row["tools"] == (TALK["tools"] if talk else None)
        assert row["chat_template_kwargs"] == (TALK["chat_template_kwargs"] if talk else None)
        assert talk or [set(turn) for turn in row["messages"]] == [{"role", "content"}] * 2


def test_tools_as_text_and_documents(tmp_path: Path):
    """TRL takes tools as JSON too; documents are a variable of templates that transformers names."""
    row = chat(1) | {"tools": json.dumps(TALK["tools"]), "documents": [{"title": "a", "text": "b"}]}
    (found,) = file_chats(write(tmp_path / "own.jsonl", [row]))
    assert found["tools"] == TALK["tools"]
    assert found["chat_template_kwargs"] == {"documents": [{"title": "a", "text": "b"}]}


def test_nulls_of_a_parquet_file_are_fields_that_are_missing(tmp_path: Path):
    """Arrow gives every turn the fields of all; what JSON columns hold stays as it is, nulls too."""
    rows = [{"messages": TALK["messages"][:4]}, chat(1)]
    plain = json.loads(json.dumps(rows).replace('"sites": ["y", 2]', '"sites": ["y", "z"]'))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "own.parquet")
    first, second = file_chats(tmp_path / "own.parquet")
    calls = [one["function"] for one in first["messages"][1].pop("tool_calls")]
    arguments = [{"a": 1}, {"text": "x", "sites": ["y", "z"]}]
    assert calls == [{"name": name, "arguments": each} for name, each in zip(("add", "search"), arguments, strict=True)]
    assert first["messages"][1] == say("assistant", None)
    assert first["messages"][2:] == TALK["messages"][2:4]
    assert second == chat(1)
    exact = datasets.Dataset.from_list(rows, features=datasets.Features({"messages": datasets.Json()}))
    exact.to_parquet(tmp_path / "exact.parquet")
    assert list(file_chats(tmp_path / "exact.parquet")) == rows


# What is refused


BAD = {
    "no JSON": ('{"messages": [', "line 3 is no JSON: "),
    "too deep": ("[" * 100_000, "line 3 is no JSON: "),
    "no object": ('"messages"', "line 3: found str; needed: 'messages', a list of turns with 'role' and 'content'"),
    "other columns": (json.dumps({"text": "a", "id": 4}), r"line 3: found \['id', 'text'\]; needed: 'messages', a li"),
    "no list": (json.dumps({"messages": "a"}), r"line 3: found \['messages'\]; needed: 'messages', a list of turns"),
    "no turns": (json.dumps({"messages": []}), r"line 3: found \['messages'\]; needed: 'messages', a list of turns"),
    "no turn": (json.dumps({"messages": ["hi"]}), "line 3, turn 1: role None; accepted: system, user, assistant, tool"),
    "ShareGPT": (
        json.dumps({"messages": [{"from": "human", "value": "a"}]}),
        "line 3, turn 1: role None; accepted: system, user, assistant, tool$",
    ),
    "role": (
        json.dumps({"messages": [say("user", "a"), say("Assistant", "b")]}),
        "line 3, turn 2: role 'Assistant'; accepted: system, user, assistant, tool$",
    ),
    "no role": (json.dumps({"messages": [say(["user"], "a")]}), r"line 3, turn 1: role \['user'\]; accepted: system"),
    "no content": (
        json.dumps({"messages": [say("user", "a"), say("assistant", None)]}),
        "line 3, turn 2: content is None; accepted: text$",
    ),
    "parts": (
        json.dumps({"messages": [say("user", [{"type": "image", "url": "a"}]), say("assistant", "b")]}),
        r"line 3, turn 1: content is \[\{'type': 'image', 'url': 'a'\}\]; accepted: text$",
    ),
    "calls": (
        json.dumps({"messages": [say("user", "a"), {**say("assistant", None), "tool_calls": ["f()"]}]}),
        r"line 3, turn 2: tool_calls is \['f\(\)'\]; accepted: a list of objects$",
    ),
    "tools": (
        json.dumps(chat(3) | {"tools": {"name": "f"}}),
        r"line 3: tools is \{'name': 'f'\}; accepted: a list of objects$",
    ),
    "tools of no JSON": (json.dumps(chat(3) | {"tools": "f()"}), "line 3: tools is no JSON: "),
    "variables": (
        json.dumps(chat(3) | {"chat_template_kwargs": ["a"]}),
        r"line 3: chat_template_kwargs is \['a'\]; accepted: an object$",
    ),
    "no number": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": NaN}]}',
        "line 3 has a value that JSON or UTF-8 has no form for: ",
    ),
    "no assistant": (
        json.dumps({"messages": [say("system", "a"), say("user", "b")]}),
        "line 3: no turn of the assistant says anything, so there is nothing to learn$",
    ),
    "silent assistant": (
        json.dumps({"messages": [say("user", "b"), say("assistant", " \n")]}),
        "line 3: no turn of the assistant says anything, so there is nothing to learn$",
    ),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_a_line_that_is_no_chat_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(chat(1))}\n\n{line}\n{json.dumps(chat(2))}\n")
    with pytest.raises(TrainingError, match=f"^{path} {message}") as caught:
        load_chats(str(path), None, SPLITS, 0, 0)
    assert "\n" not in str(caught.value)


def test_a_line_that_is_no_utf8_is_named(tmp_path: Path):
    (tmp_path / "own.jsonl").write_bytes(json.dumps(chat(1)).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(TrainingError, match=r"own\.jsonl line 2 is no JSON: "):
        list(file_chats(tmp_path / "own.jsonl"))


def test_half_a_letter_is_no_text(tmp_path: Path):
    """JSON can spell a surrogate that no encoding of text has, and neither Arrow nor a tokenizer takes it."""
    path = write(tmp_path / "own.jsonl", [chat(1), {"messages": [say("user", "\ud800"), say("assistant", "a")]}])
    with pytest.raises(TrainingError, match=r"own\.jsonl line 2, turn 1: content is .*ud800.*; accepted: text$"):
        load_chats(str(path), None, SPLITS, 0, 0)


def test_a_row_that_is_no_chat_is_named(tmp_path: Path):
    path = tmp_path / "own.parquet"
    rows = [chat(1), {"messages": [say("user", "a"), say("assistant", None)]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(TrainingError, match=f"^{path} row 2, turn 2: content is None; accepted: text$"):
        list(file_chats(path))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(TrainingError, match=rf"^{path} row 1: found \['text'\]; needed: 'messages'"):
        list(file_chats(path))


def damaged(data: bytes, how: str) -> bytes:
    if how == "pages":
        return data[:8] + bytes(80) + data[88:]
    return {"empty": b"", "text": b"no parquet at all", "half": data[: len(data) // 2]}[how]


@pytest.mark.parametrize("how", ["empty", "text", "half", "pages"])
def test_a_broken_parquet_file_is_named(tmp_path: Path, how: str):
    path = tmp_path / "own.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat(number) for number in range(30)]), path)
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(TrainingError, match=f"^{path} is no parquet file: .") as caught:
        load_chats(str(path), None, SPLITS, 3, 0)
    assert "\n" not in str(caught.value)


def test_another_suffix_is_refused(tmp_path: Path):
    path = write(tmp_path / "own.csv", [chat(1)])
    with pytest.raises(
        TrainingError, match=f"^{path}: accepted: .jsonl, a chat a line, or .parquet with a column 'messages'$"
    ):
        load_chats(str(path), None, SPLITS, 0, 0)


@pytest.mark.parametrize(("rows", "wanted"), [(0, 2), (19, 2), (1, 200)])
def test_too_few_chats(tmp_path: Path, rows: int, wanted: int):
    path = write(tmp_path / "own.jsonl", [chat(number) for number in range(rows)])
    with pytest.raises(TrainingError, match=f"^{path}: {rows} chats; at least 20 are needed to hold two back$"):
        load_chats(str(path), None, SPLITS, wanted, 0)


def test_a_configuration_belongs_to_the_hub(tmp_path: Path):
    path = write(tmp_path / "own.jsonl", [chat(number) for number in range(20)])
    with pytest.raises(TrainingError, match=f"^--dataset_config all belongs to a Hub data set; found {path}$"):
        load_chats(str(path), "all", SPLITS, 1, 0)
    with pytest.raises(TrainingError, match=r"^--dataset_config all belongs to a Hub data set; found none$"):
        load_chats(None, "all", SPLITS, 1, 0)


@pytest.mark.parametrize("name", ["missing.jsonl", "/nowhere/own.jsonl", "owner/name:all", "a/b/c", ".", ""])
def test_what_is_neither_a_file_nor_a_name_of_the_hub(name: str):
    with pytest.raises(TrainingError) as caught:
        load_chats(name, None, SPLITS, 1, 0)
    assert str(caught.value) == (
        f"--dataset_name {name}: accepted: a .jsonl or .parquet file, or a Hub data set OWNER/NAME"
    )


def test_a_data_set_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    start = "^--dataset_name nobody/nothing cannot be read as a Hub data set: OfflineModeIsEnabled: .*offline"
    with pytest.raises(TrainingError, match=start) as caught:
        load_chats("nobody/nothing", "all", SPLITS, 1, 0)
    assert "\n" not in str(caught.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import finds where it is not installed
    with pytest.raises(
        MissingExtraError, match=r"^reading chats needs .*: pip install 'namex-hf\[train\]', in a clone"
    ):
        load_chats(None, None, SPLITS, 1, 0)


@settings(max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["messages", "role", "content", "x"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_value_is_a_chat_or_refused_with_its_place(row: Any):
    found, refused = None, ""
    try:
        found = checked(row, "own.jsonl line 4")
    except TrainingError as error:
        refused = str(error)
    if found is None:
        assert refused.startswith("own.jsonl line 4")
    else:
        assert found["messages"] == row["messages"]


# What is told


def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any):
    check_template(tokenizer, "tiny")
    with pytest.raises(TrainingError, match=r"^the tokenizer of toy has no chat template; accepted: --chat_template"):
        check_template(toy_tokenizer(), "toy")
