"""What came from outside is printed as one line that no terminal obeys."""

import unicodedata
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from namex_hf.errors import CheckpointError
from namex_hf.printable import HIDDEN, printable


@given(st.text(st.characters(), max_size=400), st.integers(10, 100))
def test_no_text_is_more_than_a_line_or_obeyed(text: str, longest: int) -> None:
    line = printable(text, longest)
    assert len(line) <= longest
    assert not any(unicodedata.category(letter) in HIDDEN for letter in line)


def test_plain_text_stays_as_it_is() -> None:
    assert printable("tensor model.é: 3 of 4; 模型") == "tensor model.é: 3 of 4; 模型"


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable("a\x1b[2Jb\u202ec\nd\ud800") == "a\\x1b[2Jb\\u202ec d\\ud800"


def test_a_long_text_keeps_both_ends() -> None:
    line = printable("begin" + "x" * 10_000_000 + "end", 60)
    assert line.startswith("begin")
    assert line.endswith("end")
    assert " ... " in line


def test_every_error_is_one_line() -> None:
    assert str(CheckpointError("two\nlines\x07")) == "two lines\\x07"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Bearer abc.def-1", "***"),
        ("hf_" + "a" * 20, "***"),
        ("x hf_" + "Zz09" * 5 + " y", "x *** y"),
        ("me/hf_" + "Zz09" * 5 + " is", "me/*** is"),
        ("hf_oauth_eyJhbGci.eyJzd-x1", "***"),
        ("hf_hub_download failed", "hf_hub_download failed"),
        ("GET https://me:pass@h.co/a?b=1", "GET https://***@h.co/a?b=1"),
        ("https://h/x?X-Amz-Signature=ab12&n=1&token=cd", "https://h/x?X-Amz-Signature=***&n=1&token=***"),
        ("pad_token=<pad>, me@h.co", "pad_token=<pad>, me@h.co"),
    ],
)
def test_nothing_that_looks_like_a_secret_is_said(text: str, said: str) -> None:
    assert printable(text) == said
    assert str(CheckpointError(f"a\n {text}")) == f"a {said}"


def test_secrets_in_use_are_not_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "my-own-token")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:p%40ss/word@hub.example")
    (tmp_path / "token").write_text("stored-token\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert printable("my-own-token, stored-token") == "***, ***"
    assert printable("at https://me:p%40ss/word@hub.example/x: p@ss/word") == "at https://***@hub.example/x: ***"
