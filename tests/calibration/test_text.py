"""Text to token sequences: what every kind of source gives, in which order, and what is said of bad ones."""

import hashlib
import json
import os
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from namex_hf import limited
from namex_hf.calibration.sources import PACKAGED
from namex_hf.calibration.text import CalibrationText, calibration_text, pieces
from namex_hf.errors import CalibrationError, MissingExtraError
from tests.helpers.toy_models import toy_tokenizer

DOMAINS = 6
CHAT = [{"role": "user", "content": "Say moo."}, {"role": "assistant", "content": "Moo, said the cow."}]


def jsonl(file: Path, *records: object) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def novel(file: Path, lines: int) -> list[str]:
    found = [f"This is line {n:05d} of the novel." for n in range(lines)]
    file.write_text("\n".join(found) + "\n")
    return found


def documents(text: CalibrationText, tokenizer: Any, source: int | None = None) -> list[str]:
    """What the sequences (of one source) say, end to end, cut at the ends of text."""
    ids = text.ids if source is None else text.ids[text.sources == source]
    return tokenizer.decode(ids.flatten()).split(tokenizer.eos_token)


def held_back(*sources: int) -> list[int]:
    """The numbers of the sequences that are held back, of sequences of these sources."""
    ids = torch.zeros(len(sources), 1, dtype=torch.int64)
    held_out = CalibrationText(ids, torch.tensor(sources), "a", "b").held_out
    assert held_out.dtype == torch.bool
    return held_out.nonzero().flatten().tolist()


def test_packaged_text_is_sequences_of_all_domains(packaged_tokenizer: Any):
    text = calibration_text("packaged", packaged_tokenizer, 40 * 128 + 127, 128, seed=0)
    assert text.ids.shape == (40, 128)
    assert text.ids.dtype == torch.int64
    assert text.tokens == 40 * 128
    assert text.name == "packaged"
    assert text.sources[:12].tolist() == list(range(DOMAINS)) * 2
    plain = struct.pack(f"<{text.tokens}q", *text.ids.flatten().tolist())
    assert text.sha256 == hashlib.sha256(plain).hexdigest()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_domain_is_heard_under_a_small_budget(tiny: Any, seed: int):
    text = calibration_text("packaged", tiny, DOMAINS * 256, 256, seed)
    said = [" ".join(tiny.decode(row).split()) for row in text.ids]
    signs = {
        "chat": lambda t: "<|im_start|>" in t,
        "arithmetic": lambda t: "Question: " in t and "Answer: " in t,
        "dictionary": lambda t: any(kind in t for kind in ("(noun): ", "(adj): ", "(verb): ")),
    }
    for name, sign in signs.items():
        assert sum(map(sign, said)) == 1, name
    for domain in ("prose", "code", "manual"):
        whole = " ".join((PACKAGED / f"{domain}.txt").read_text().split())
        assert sum(one.split("<|endoftext|>")[0][10:-10] in whole for one in said) == 1, domain


def test_the_same_call_gives_the_same_ids_anywhere(tiny: Any):
    text = calibration_text("packaged", tiny, 4096, 64, seed=0)
    assert text.sha256[:12] == "beca499b314d"
    assert calibration_text("packaged", tiny, 4096, 64, seed=0).ids.equal(text.ids)
    assert calibration_text("packaged", tiny, 4096, 64, seed=1).sha256 != text.sha256


def test_packaged_text_is_for_tokenizers_without_a_chat_template_too(letters: Any):
    text = calibration_text("packaged", letters, 20 * 64, 64, seed=0)
    assert text.ids.shape == (20, 64)
    assert set(text.sources.tolist()) == set(range(DOMAINS - 1))


def test_all_of_the_packaged_text_and_no_more(tiny: Any):
    text = calibration_text("packaged", tiny, 10**7, 1024, seed=0)
    assert 400_000 < text.tokens < 10**6
    assert all(count >= 64 for count in text.sources.bincount()[:DOMAINS])
    assert text.ids.min() >= 0
    assert text.ids.max() < len(tiny)


def test_a_text_file_is_a_document(letters: Any, tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabcdefg")
    text = calibration_text(str(tmp_path / "a.txt"), letters, 100, 8, seed=0)
    assert letters.decode(text.ids[0]) == "abcdefg" + letters.eos_token
    assert text.ids.shape == (1, 8)
    assert text.name == "a.txt"


def test_a_tokenizer_adds_nothing_of_its_own(tmp_path: Path):
    letters = toy_tokenizer()
    letters.backend_tokenizer.post_processor = TemplateProcessing("a $A", special_tokens=[("a", 64)])
    assert letters.decode(letters("bc").input_ids) == "abc"
    source = jsonl(tmp_path / "a.jsonl", {"text": "bc"})
    assert letters.decode(calibration_text(source, letters, 3, 3, seed=0).ids[0]) == "bc" + letters.eos_token


def test_without_an_end_of_text_nothing_is_between(letters: Any, tmp_path: Path):
    letters = type(letters)(tokenizer_object=letters.backend_tokenizer)
    assert letters.eos_token_id is None
    source = jsonl(tmp_path / "a.jsonl", {"text": "ab"}, {"text": "ab"})
    assert letters.decode(calibration_text(source, letters, 4, 4, seed=0).ids[0]) == "abab"


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL"])
def test_lines_are_documents_in_random_order(letters: Any, tmp_path: Path, name: str):
    words = [f"{n:06d}é\u2028" for n in range(40)]
    source = jsonl(tmp_path / name, *({"text": word, "n": 1} for word in words))
    Path(source).write_bytes(b"\xef\xbb\xbf" + Path(source).read_bytes().replace(b"\n", b"\r\n\n", 3))
    orders = []
    for seed in (0, 1):
        text = calibration_text(source, letters, 1000, 12, seed)  # bytes of a word, and its end
        found = documents(text, letters)[:-1]
        assert sorted(found) == words
        assert found != words
        orders.append(found)
    assert orders[0] != orders[1]


def test_messages_are_written_by_the_chat_template(tiny: Any, tmp_path: Path):
    source = jsonl(tmp_path / "chats.jsonl", {"messages": CHAT, "text": "not this"})
    said = tiny.apply_chat_template(CHAT, tokenize=False)
    length = len(tiny(said).input_ids) + 1
    text = calibration_text(source, tiny, length, length, seed=0)
    assert text.ids[0].tolist() == [*tiny(said).input_ids, tiny.eos_token_id]


QUESTION, ANSWER = (turn["content"] for turn in CHAT)
SHARED = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": CHAT},
        {"conversations": SHARED, "source": "a set"},
        {"messages": [{**turn, "tool_calls": None} for turn in CHAT]},
        {"prompt": QUESTION, "completion": ANSWER},
        {"question": QUESTION, "answer": ANSWER, "level": 3},
        {"problem": QUESTION, "solution": ANSWER},
        {"instruction": QUESTION, "output": ANSWER, "input": ""},
    ],
    ids=lambda record: "-".join(record),
)
def test_the_usual_columns_of_chats_and_answers(tiny: Any, tmp_path: Path, record: dict[str, Any]):
    source, said = jsonl(tmp_path / "chats.jsonl", record), tiny.apply_chat_template(CHAT, tokenize=False)
    length = len(tiny(said).input_ids) + 1
    found = calibration_text(source, tiny, length, length, seed=0)
    assert found.ids[0].tolist() == [*tiny(said).input_ids, tiny.eos_token_id]


def test_an_answer_without_a_chat_template_is_text(letters: Any, tmp_path: Path):
    source = jsonl(tmp_path / "a.jsonl", {"problem": "one", "solution": "two"}, {"content": "def one(): pass"})
    found = documents(calibration_text(source, letters, 25, 25, seed=0), letters)
    assert {*found[:2]} == {"one\n\ntwo", "def one(): pass"}


@pytest.mark.parametrize("tools", [list, json.dumps])
def test_tools_and_their_results_are_written_by_the_chat_template(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: Any
):
    """As the template of the tokenizer has them; columns that are empty in a turn are not there."""
    tool = {"type": "function", "function": {"name": "moo", "parameters": {}}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "moo"}}]}
    chat = [{**CHAT[0], "tool_calls": None}, call, {"role": "tool", "content": "Moo!", "tool_calls": None}, CHAT[1]]
    template = (
        "{% for t in tools %}T:{{ t.function.name }} {% endfor %}{% for m in messages %}"
        "{{ m.role }}:{{ m.content or m.tool_calls[0].function.name }}{% if m.tool_calls is defined %}!{% endif %}|"
        "{% endfor %}"
    )
    monkeypatch.setattr(tiny, "chat_template", template)
    said = "T:moo user:Say moo.|assistant:moo!|tool:Moo!|assistant:Moo, said the cow.|"
    source = jsonl(tmp_path / "a.jsonl", {"messages": chat, "tools": tools([tool])})
    length = len(tiny(said).input_ids) + 1
    assert documents(calibration_text(source, tiny, length, length, seed=0), tiny)[0] == said


def test_a_novel_is_more_than_its_first_page(letters: Any, tmp_path: Path):
    lines = novel(tmp_path / "novel.md", 2000)
    source = str(tmp_path / "novel.md")
    starts = []
    for seed in range(5):
        said = documents(calibration_text(source, letters, 8 * 256, 256, seed), letters)
        assert len(said) > 1  # two sequences are about one piece
        assert all(line in lines for piece in said[:-1] for line in piece.splitlines())
        starts.append(lines.index(said[0].splitlines()[0]))
    assert len(set(starts)) == 5
    assert max(starts) > 1000
    whole = calibration_text(source, letters, 10**6, 64, seed=0)
    missing = Counter(lines) - Counter("".join(documents(whole, letters)).splitlines())
    assert sum(missing.values()) <= 2  # the tail that is no sequence


@pytest.mark.parametrize("size", [8, 16, 100, 10**6])
def test_pieces_are_cut_where_nothing_is_torn(size: int):
    text = "\n\n".join("\n".join("some words in a line" for _ in range(3)) for _ in range(20)) + "x" * 500
    found = pieces(text, size)
    assert "".join(found) == text
    assert all(0 < len(piece) <= size for piece in found)
    assert pieces(" \n\n ", size) == []
    assert pieces("", size) == []


def test_pieces_begin_with_a_paragraph_or_a_line_or_a_word():
    assert pieces("one two\nthree\n\nfour five", 16) == ["one two\nthree\n\n", "four five"]
    assert pieces("one two 3\n\nfour\nfive six", 18) == ["one two 3\n\n", "four\nfive six"]
    assert pieces("one two three\nfour five", 16) == ["one two three\n", "four five"]
    assert pieces("one two three four", 16) == ["one two three ", "four"]
    assert pieces("abcdefghij", 4) == ["abcd", "efgh", "ij"]


def test_a_folder_is_its_files_in_turn(letters: Any, tmp_path: Path):
    folder = tmp_path / ".home" / "corpus"
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / ".hidden" / "deep").mkdir(parents=True)
    for place, letter in (("b.txt", "b"), ("deep/deeper/a.md", "a"), ("c.jsonl", "c")):
        (folder / place).write_text(json.dumps({"text": letter * 99}) + "\n" if letter == "c" else letter * 99)
    for place in (".secret.txt", ".hidden/d.txt", ".hidden/deep/d.txt"):
        (folder / place).write_text("d" * 990)
    text = calibration_text(str(folder), letters, 1000, 10, seed=0)
    assert text.name == "corpus"
    assert text.tokens == 300
    assert text.sources.tolist() == [0, 1, 2] * 10
    heard = [set("".join(documents(text, letters, n))) for n in range(3)]
    assert sorted(map(sorted, heard)) == [["a"], ["b"], ["c"]]


def test_one_that_ends_leaves_its_turns_to_the_others(letters: Any, tmp_path: Path):
    (tmp_path / "short.txt").write_text("s" * 25)
    (tmp_path / "long.txt").write_text("l" * 500)
    text = calibration_text(str(tmp_path), letters, 200, 10, seed=0)
    assert text.tokens == 200
    assert sorted(text.sources.bincount().tolist()) == [2, 18]


def test_many_short_files_make_a_text(letters: Any, tmp_path: Path):
    for n in range(30):
        (tmp_path / f"{n:02d}.txt").write_text(f"file {n:02d}")
    (tmp_path / "empty.txt").write_text("\n")
    text = calibration_text(str(tmp_path), letters, 10**6, 64, seed=0)
    assert text.ids.shape == (30 * 8 // 64, 64)
    assert set(text.sources.tolist()) == {31}  # after all files
    assert len(set(documents(text, letters)[:-1])) >= 23


def test_more_files_than_sequences_are_drawn_from(letters: Any, tmp_path: Path):
    for letter in "abcdefghijklmnop":
        (tmp_path / f"{letter}.txt").write_text(letter * 20)
    heard = [letters.decode(calibration_text(str(tmp_path), letters, 20, 10, seed).ids[:, 0]) for seed in range(4)]
    assert len(set(heard)) > 1
    assert "ab" not in heard


def test_no_more_is_tokenised_than_is_needed(letters: Any, tmp_path: Path):
    class Counting:
        chat_template = None
        eos_token_id = letters.eos_token_id
        characters = 0

        def __call__(self, text: str, **options: Any) -> Any:
            self.characters += len(text)
            return letters(text, **options)

    novel(tmp_path / "novel.txt", 20_000)
    jsonl(tmp_path / "lines.jsonl", *({"text": "some words " * 5} for _ in range(20_000)))
    counting = Counting()
    assert calibration_text(str(tmp_path), counting, 10 * 64, 64, seed=0).tokens == 640
    assert 640 <= counting.characters + 20 < 3 * 640


@pytest.mark.parametrize("way", ["relative", "dot", "trailing"])
def test_a_name_is_no_path(letters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str):
    folder = tmp_path / "secret" / "corpus"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("a" * 20)
    monkeypatch.chdir(folder if way == "dot" else tmp_path)
    source = {"relative": "secret/corpus", "dot": ".", "trailing": f"{folder}/"}[way]
    assert calibration_text(source, letters, 10, 10, seed=0).name == "corpus"


def test_packaged_is_never_a_folder_of_that_name(letters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "packaged").mkdir()
    (tmp_path / "packaged" / "a.txt").write_text("a" * 100)
    monkeypatch.chdir(tmp_path)
    assert "aaaaaaaa" not in letters.decode(calibration_text("packaged", letters, 60, 10, seed=0).ids.flatten())
    assert "aaaaaaaa" in letters.decode(calibration_text("./packaged", letters, 60, 10, seed=0).ids.flatten())


def test_the_last_eighth_of_every_source_is_held_back():
    assert held_back(*[0, 1] * 16, *[0] * 8) == [29, 31, 37, 38, 39]
    assert held_back(0, 1, 0, 1, 2) == [2, 3]
    assert held_back(0, 0) == [1]
    assert held_back(*[0] * 15) == [14]


def test_of_the_packaged_text_all_domains_are_held_back(tiny: Any):
    text = calibration_text("packaged", tiny, DOMAINS * 16 * 64, 64, seed=0)
    assert text.held_out.nonzero().flatten().tolist() == list(range(DOMAINS * 14, DOMAINS * 16))  # they take turns
    train, validation = text.ids[~text.held_out].tolist(), text.ids[text.held_out].tolist()
    assert not {tuple(row) for row in train} & {tuple(row) for row in validation}


def test_too_few_sequences_to_hold_one_back():
    with pytest.raises(CalibrationError, match="a: 3 sequences, and no file or data set has two"):
        held_back(0, 1, 2)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bad.jsonl", b'{"text": "fine"}\n\n{"text": \n', "bad.jsonl, line 3 is no JSON: Expecting value"),
        (
            "names.jsonl",
            b'{"txt": "a", "n": 1}\n',
            "names.jsonl, line 1: accepted: .*'messages'.*'text'; found: txt, n",
        ),
        ("number.jsonl", b'{"text": 3}\n', "number.jsonl, line 1: accepted: .*; found: text"),
        ("list.jsonl", b"[1]\n", "list.jsonl, line 1: accepted: .*; found: neither"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "latin.txt is not UTF-8 text: .* at byte 3"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "latin.jsonl, line 2 is not UTF-8 text: .* at byte 10"),
        ("half.jsonl", b'{"text": "\\ud800"}', "half.jsonl, line 1 is not text: surrogates not allowed"),
        ("role.jsonl", b'{"messages": [{"content": "a"}]}', "role.jsonl, line 1: .*chat template refuses it: .*role"),
        ("turn.jsonl", b'{"messages": ["a"]}', "turn.jsonl, line 1: .*chat template refuses it"),
        ("empty.txt", b"", "empty.txt has 0 tokens of text; a sequence needs 8"),
        ("blank.jsonl", b"\n\n", "blank.jsonl has 0 tokens of text; a sequence needs 8"),
        ("short.txt", b"and", "short.txt has 2 tokens of text; a sequence needs 8"),
    ],
)
def test_what_cannot_be_read(tiny: Any, tmp_path: Path, name: str, content: bytes, says: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=says) as caught:
        calibration_text(str(tmp_path / name), tiny, 100, 8, seed=0)
    assert "\n" not in str(caught.value)
    with pytest.raises(CalibrationError):
        calibration_text(str(tmp_path), tiny, 100, 8, seed=0)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_chat_template_that_loops(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limited, "SECONDS", 0.2)
    source = jsonl(tmp_path / "chats.jsonl", {"messages": CHAT})
    assert calibration_text(source, tiny, 100, 8, seed=0).tokens >= 8
    monkeypatch.setattr(tiny, "chat_template", LOOP)
    with pytest.raises(CalibrationError, match=r"line 1: the tokenizer's chat template takes longer than 0.2 s"):
        calibration_text(source, tiny, 100, 8, seed=0)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("pipe.txt", os.mkfifo, r"cannot be read \(a FIFO\)"),
        ("pipe.jsonl", os.mkfifo, r"cannot be read \(a FIFO\)"),
        ("zero.jsonl", lambda path: path.symlink_to("/dev/zero"), r"cannot be read \(a device\)"),
        (
            "long.jsonl",
            lambda path: (path.touch(), os.truncate(path, 1 << 30)),
            "line 1 has more than 67,108,864 bytes",
        ),
        (
            "long.txt",
            lambda path: (path.touch(), os.truncate(path, 1 << 30)),
            "has 1,073,741,824 bytes; accepted: up to",
        ),
        ("deep.jsonl", lambda path: path.write_text(1000 * '{"a":' + "1" + 1000 * "}"), "nested deeper than 100"),
    ],
)
def test_what_would_hang_or_flood(tiny: Any, tmp_path: Path, name: str, make: Callable[[Path], object], says: str):
    make(tmp_path / name)
    with pytest.raises(CalibrationError, match=f"{name}.*{says}"):
        calibration_text(str(tmp_path / name), tiny, 100, 8, seed=0)


def test_a_chat_needs_a_chat_template(letters: Any, tmp_path: Path):
    source = jsonl(tmp_path / "chats.jsonl", {"messages": CHAT})
    with pytest.raises(
        CalibrationError, match=r"chats.jsonl, line 1 is a chat, and the tokenizer has no chat template"
    ):
        calibration_text(source, letters, 10, 10, seed=0)


@pytest.mark.parametrize(
    "source", ["", "nothing", "../nothing", "./no/such/file.txt", "/no/such", "a b/c", "me/data:x:y:z"]
)
def test_what_names_nothing(letters: Any, source: str):
    with pytest.raises(CalibrationError, match="no such file or folder; accepted: 'packaged', a text file"):
        calibration_text(source, letters, 10, 10, seed=0)


@pytest.mark.parametrize(("source", "more"), [("self", ""), ("self:me/chats:all", " --chats me/chats:all")])
def test_own_answers_have_a_command(letters: Any, source: str, more: str):
    with pytest.raises(CalibrationError, match=f"by namex answers MODEL --out answers.jsonl{more};"):
        calibration_text(source, letters, 10, 10, seed=0)


@pytest.mark.parametrize(("tokens", "length"), [(63, 64), (0, 64), (10, 0), (10, -1), (-1, -2)])
def test_numbers_that_leave_no_sequence(letters: Any, tokens: int, length: int):
    with pytest.raises(CalibrationError, match=f"{tokens} calibration tokens, and sequences of {length}; accepted"):
        calibration_text("packaged", letters, tokens, length, seed=0)


def test_a_data_set_of_the_hub_needs_the_extra(letters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"calibration data me/data .*'namex-hf\[train\]'"):
        calibration_text("me/data", letters, 10, 10, seed=0)
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "data").write_text("a" * 10)
    monkeypatch.chdir(tmp_path)
    assert calibration_text("me/data", letters, 10, 10, seed=0).name == "data"
