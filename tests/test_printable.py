"""What came from outside is printed as one line that no terminal obeys."""

import unicodedata

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
