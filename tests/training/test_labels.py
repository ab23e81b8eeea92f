"""Chats as tokens and labels: what the template reads, what is cut, and what is refused with its row."""

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer
from trl import SFTConfig

from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.errors import TrainingError
from namex_hf.training.chats import Chats, load_chats
from namex_hf.training.labels import Labelled, labelled, length_table

READS_ALL = (
    "{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}"
    "{%- if m['role'] == 'assistant' -%}{% generation %}"
    "{%- if m.reasoning_content and enable_thinking %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif -%}"
    "{%- if m['content'] is string %}{{- m['content'] -}}{% endif -%}"
    "{%- for c in m.tool_calls or [] %}{{ '<tool_call>' + (c | tojson) + '</tool_call>' }}{% endfor -%}"
    "{{- '<|im_end|>' -}}{% endgeneration %}"
    "{%- elif m['content'] is string -%}{{- m['content'] + '<|im_end|>' -}}"
    "{%- else -%}{%- for part in m['content'] %}{{ part['text'] }}{% endfor -%}{{- '<|im_end|>' -}}"
    "{%- endif -%}{{- '\n' -}}{%- endfor -%}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
TALK: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "How much is 1 + 2?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": "It is 3.", "reasoning_content": "The tool says 3."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    "chat_template_kwargs": {"enable_thinking": True},
}
ANSWERED = [
    '<tool_call>{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": null}}}</tool_call>'
    "<|im_end|>",
    "<think>The tool says 3.</think>It is 3.<|im_end|>",
]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats_of(folder: Path, rows: Sequence[dict[str, Any]], held_out: int = 2) -> Chats:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_chats(str(path), None, ("train", "test"), held_out, 0)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(PACKAGED / "tiny")


@pytest.fixture
def reader(tokenizer: Any) -> Any:
    tokenizer.chat_template = READS_ALL
    return tokenizer


def settings(folder: Path, **changes: Any) -> SFTConfig:
    values = {"assistant_only_loss": True, "packing": True, "eval_packing": False, "max_length": 128} | changes
    return SFTConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", **values)


def answers(found: Labelled, tokenizer: Any) -> list[str]:
    """The text that is learnt of every chat to train on."""
    return [
        tokenizer.decode([label for label in row["labels"] if label != -100], skip_special_tokens=False)
        for row in found.train
    ]


def test_calls_and_thoughts_are_learnt_and_tools_are_read(tmp_path: Path, reader: Any):
    found = labelled(chats_of(tmp_path, [TALK] * 20), reader, settings(tmp_path, max_length=1024))
    assert answers(found, reader) == ["".join(ANSWERED)] * 18
    text = reader.decode(found.train[0]["input_ids"], skip_special_tokens=False)
    assert text.startswith('<|im_start|>system\n[{"type": "function", "function": {"name": "add"')
    assert "user\nHow much is 1 + 2?<|im_end|>" in text
    assert "None" not in text
    assert found.unread == ("name",)
    assert found.lengths.tolist() == [len(found.train[0]["input_ids"])] * 18


def test_the_result_does_not_depend_on_processes(tmp_path: Path, reader: Any):
    rows = [chat(f"question {number}", f"answer {number}") for number in range(30)]
    rows[3::4] = [TALK] * len(rows[3::4])
    one, two = (
        labelled(chats_of(tmp_path, rows), reader, settings(tmp_path, max_length=256, dataset_num_proc=number))
        for number in (None, 2)
    )
    assert one.train.to_list() == two.train.to_list()
    assert one.held_out.to_list() == two.held_out.to_list()
    assert one.lengths.tolist() == two.lengths.tolist()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "calls are not read": (
        "{% for m in messages %}{% generation %}{{ m['content'] or '' }}<|im_end|>{% endgeneration %}{% endfor %}",
        {"messages": TALK["messages"][1:]},
        "the chat template does not read tool_calls",
    ),
    "parts are printed": (
        "{% for m in messages %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% endfor %}",
        {"messages": [TALK["messages"][0], TALK["messages"][3]]},
        "the chat template does not read content in parts",
    ),
    "the template complains": (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
        {"messages": TALK["messages"][2:]},
        "the chat template does not take it: TemplateError: no tools here",
    ),
    "a variable of apply_chat_template": (
        READS_ALL,
        chat("a", "b") | {"chat_template_kwargs": {"tokenize": False}},
        "the chat template does not take it: TypeError: ",
    ),
    "no answer is marked": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
        {"messages": [{"role": "assistant", "content": "b"}]},
        "the chat template marks no token of an answer",
    ),
}


@pytest.mark.parametrize(("template", "row", "said"), REFUSED.values(), ids=REFUSED)
def test_a_chat_that_would_be_learnt_as_something_else(tmp_path, tokenizer, template, row, said):
    """Named by its line, in several processes too."""
    tokenizer.chat_template = template
    rows = [*[chat("a", "b")] * 10, row, *[chat("a", "b")] * 14]
    for processes in (None, 2):
        with pytest.raises(TrainingError) as caught:
            labelled(chats_of(tmp_path, rows), tokenizer, settings(tmp_path, dataset_num_proc=processes))
        assert str(caught.value).startswith(f"{tmp_path / 'own.jsonl'} line 11: {said}")


def test_a_template_that_never_ends(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("namex_hf.training.labels.SECONDS", 0.2)
    tokenizer.chat_template = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(TrainingError, match=r"line \d+: the chat template takes longer than 0\.2 s"):
        labelled(chats_of(tmp_path, [chat("a", "b")] * 20), tokenizer, settings(tmp_path, assistant_only_loss=False))


# What is cut away

SHORT, LONG = chat("Hi", "Hello there."), chat("The quick brown fox jumps. " * 60, "A fox.")


def figures(found: Labelled) -> dict[str, str]:
    """The table's rows."""
    console = Console(file=StringIO(), width=160)
    console.print(length_table(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return {name.strip(): figure.strip() for name, figure in rows}


@pytest.mark.parametrize("packing", [True, False])
def test_chats_that_lose_their_whole_answer_are_counted_and_left_out(tmp_path: Path, tokenizer: Any, packing: bool):
    chats = chats_of(tmp_path, [SHORT if number % 3 else LONG for number in range(60)], 6)
    short, long = ([row["messages"] == one["messages"] for row in chats.train].count(True) for one in (SHORT, LONG))
    held = [row["messages"] == LONG["messages"] for row in chats.held_out].count(True)
    found = labelled(chats, tokenizer, settings(tmp_path, packing=packing))
    sizes = {
        name: len(tokenizer.apply_chat_template(one["messages"], return_dict=True)["input_ids"])
        for name, one in (("short", SHORT), ("long", LONG))
    }
    assert len(found.train) == short
    assert len(found.held_out) == 6 - held
    assert found.held_out_lost == held > 0
    assert sorted(found.lengths.tolist()) == [sizes["short"]] * short + [sizes["long"]] * long
    shown = figures(found)
    assert shown["chats"] == "54"
    assert shown["longer than a sequence of 128"] == f"{long}, which lose their end"
    assert shown["tokens cut away"] == f"{(sizes['long'] - 128) * long:,}"
    assert shown["no token of an answer is left"] == f"{long}, which are left out"
    assert shown["the same of held-out chats"] == f"{held}, which are not scored"


def test_none_is_left(tmp_path: Path, tokenizer: Any):
    chats = chats_of(tmp_path, [LONG] * 40)
    for packing in (True, False):
        with pytest.raises(TrainingError) as caught:
            labelled(chats, tokenizer, settings(tmp_path, packing=packing))
        assert str(caught.value) == (
            "none of the 38 chats to train on keeps a token of an answer within --max_length 128; accepted: a larger "
            "one, or shorter chats"
        )


@pytest.mark.parametrize(
    ("changes", "loses"),
    [
        ({"packing_strategy": "wrapped"}, "are split"),
        ({"packing": False, "truncation_mode": "keep_end"}, "lose their beginning"),
        ({"max_length": 1024}, "none"),
    ],
    ids=["split", "the beginning is cut", "long sequences"],
)
def test_nothing_is_left_out_where_answers_stay(tmp_path: Path, tokenizer: Any, changes: Any, loses: str):
    changes = {"eval_packing": None} | changes
    found = labelled(chats_of(tmp_path, [LONG] * 20), tokenizer, settings(tmp_path, **changes))
    assert len(found.train) == 18
    assert (found.answers > 1).all()
    shown = figures(found)
    assert "no token of an answer is left" not in shown
    longest = changes.get("max_length", 128)
    assert shown[f"longer than a sequence of {longest:,}"] == (loses if loses == "none" else f"18, which {loses}")


# Lengths


@pytest.mark.parametrize("source", ["tiny", "tiny-deepseek"])
def test_lengths_are_those_of_the_template(tmp_path: Path, source: str):
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / source)
    chats = load_chats(None, None, ("train", "test"), 40, 0)
    found = labelled(chats, tokenizer, settings(tmp_path, max_length=1024))
    by_hand = [
        "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row["messages"])
        for row in chats.train
    ]
    assert found.lengths.tolist() == [len(tokenizer(text)["input_ids"]) for text in by_hand]
    for row, text in zip(chats.held_out, found.held_out, strict=True):
        spoken = "".join(f"{turn['content']}<|im_end|>" for turn in row["messages"] if turn["role"] == "assistant")
        learnt = [label for label in text["labels"] if label != -100]
        assert tokenizer.decode(learnt, skip_special_tokens=False).replace("\n", "") == spoken.replace("\n", "")


def test_the_tables_figures():
    counts = np.array([10, 1010, 20, 20, 30, 40, 50, 60, 70, 90])
    found = Labelled(None, None, counts, np.ones(10, int), 0, 60, "lose their end", ("weight", "[/x]"))
    assert figures(found) == {
        "chats": "10",
        "tokens a chat": "mean 140, median 45, nine in ten up to 182",
        "the longest": "1,010",
        "longer than a sequence of 60": "3, which lose their end",
        "tokens cut away": "990",
        "tokens in all": "1,400",
        "not read by the chat template": "weight, [/x]",
    }


# Template and tokens of another model


def test_a_template_from_a_file_and_from_a_model(tmp_path: Path, tokenizer: Any):
    chats = chats_of(tmp_path, [chat("a", "b")] * 20)
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m['content'] }}!{% endgeneration %}{% endfor %}"
    )
    found = labelled(chats, tokenizer, settings(tmp_path, chat_template_path=str(tmp_path / "own.jinja")))
    assert answers(found, tokenizer) == ["a!b!"] * 18
    other = AutoTokenizer.from_pretrained(PACKAGED / "tiny")
    other.add_tokens(["<|turn|>"])
    other.chat_template = (
        "{% for m in messages %}{% generation %}<|turn|>{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    other.save_pretrained(tmp_path / "other")
    found = labelled(chats, tokenizer, settings(tmp_path, chat_template_path=str(tmp_path / "other")))
    assert found.train[0]["input_ids"].count(other.convert_tokens_to_ids("<|turn|>")) == 2
    assert "<|turn|>" not in tokenizer.get_vocab()
    with pytest.raises(TrainingError, match=r"^--eos_token <eos>: the tokenizer does not have it$"):
        labelled(chats, tokenizer, settings(tmp_path, eos_token="<eos>"))
    tokenizer.chat_template = "<|im_start|>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(TrainingError, match=r"^the chat template does not mark answers with"):
        labelled(chats, tokenizer, settings(tmp_path))
    everything = labelled(chats, tokenizer, settings(tmp_path, assistant_only_loss=False))
    assert everything.train[0]["labels"] == everything.train[0]["input_ids"]
