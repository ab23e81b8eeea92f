"""What models are scored on, and what is refused."""

from pathlib import Path

import pytest

from namex_hf.errors import NamexError
from namex_hf.evaluation.perplexity import held_out_texts
from namex_hf.evaluation.settings import settings


def test_packaged_texts_unless_files_are_given(tmp_path: Path):
    assert settings([], 8192, 200, "cpu").texts == held_out_texts()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.md").write_text("two")
    assert settings([tmp_path / "a.txt", tmp_path / "b.md"], 2, 0, "cpu").texts == {"a": "one", "b": "two"}


def test_scores_are_comparable_on_equal_texts_and_numbers_alone(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    base = settings([tmp_path / "a.txt"], 64, 3, "cuda:0").identity
    assert base == settings([tmp_path / "a.txt"], 64, 3, "cuda:1").identity
    for other in ((64, 4, "cuda"), (65, 3, "cuda"), (64, 3, "cpu")):
        assert settings([tmp_path / "a.txt"], *other).identity != base
    (tmp_path / "a.txt").write_text("two")
    assert settings([tmp_path / "a.txt"], 64, 3, "cuda").identity != base


def test_problems_of_a_kind_are_generated_by_the_named_seed():
    base = settings([], 64, 1000, "cpu", kinds=["arithmetic", "chats", "arithmetic"])
    made = base.made()
    assert list(made) == ["arithmetic", "chats"]
    assert (len(made["arithmetic"]), len(made["chats"])) == (1000, 89)  # all that this half has
    chosen = settings([], 64, 1000, "cpu", kinds=["arithmetic", "chats"], problem_seed="choices")
    assert chosen.identity != base.identity
    assert not {*made["arithmetic"]} & {*chosen.made()["arithmetic"]}
    with pytest.raises(NamexError, match="--problems 10001: accepted: 0 to 10000"):
        settings([], 64, 10001, "cpu", kinds=["arithmetic"])


@pytest.mark.parametrize(
    ("files", "numbers", "said"),
    [
        (["a.txt"], (1, 0), "--tokens 1: accepted: numbers from 2"),
        (["a.txt"], (64, -1), "--problems -1: accepted: 0 to 200"),
        (["a.txt"], (64, 201), "--problems 201: accepted: 0 to 200"),
        (["a.txt", "below/a.md"], (64, 0), "--texts has two files of the name 'a'; accepted: one a domain"),
        (["no.txt"], (64, 0), "no.txt cannot be read (No such file or directory); accepted: text files"),
        (["below"], (64, 0), "below cannot be read (Is a directory); accepted: "),
        (["bytes.txt"], (64, 0), "bytes.txt is not UTF-8 text: invalid start byte at byte 2"),
    ],
)
def test_what_is_refused(tmp_path: Path, files: list[str], numbers: tuple[int, int], said: str):
    (tmp_path / "below").mkdir()
    for name in ("a.txt", "below/a.md"):
        (tmp_path / name).write_text("text")
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    with pytest.raises(NamexError) as error:
        settings([tmp_path / name for name in files], *numbers, "cpu")
    assert said in str(error.value)
