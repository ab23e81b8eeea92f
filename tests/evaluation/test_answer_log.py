"""Answers kept through kills."""

from pathlib import Path

import pytest

from namex_hf.errors import OutputError
from namex_hf.evaluation.batches import batches_of, fitting_batch
from namex_hf.evaluation.store import ResultLog, key_of

RUN = {"model": "a", "limit": 3}


def test_what_was_written_is_known_again(tmp_path: Path) -> None:
    with ResultLog(tmp_path / "answers-0.jsonl", RUN) as journal:
        journal.add({"choices": 8})
        journal.add({"k": [-1.25, True], "l": "text\n"})
    with ResultLog(tmp_path / "answers-0.jsonl", RUN) as journal:
        assert "k" in journal
        assert "m" not in journal
        assert (journal["k"], journal["l"], journal["choices"]) == ([-1.25, True], "text\n", 8)
        assert "windows" not in journal


@pytest.mark.parametrize("cut_off", [1, 5, 20])
def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path, cut_off: int) -> None:
    with ResultLog(tmp_path / "answers-0.jsonl", RUN) as journal:
        journal.add({"k": 1})
        journal.add({"l": 2})
    path = tmp_path / "answers-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut_off])
    with ResultLog(tmp_path / "answers-0.jsonl", RUN) as journal:
        assert "k" in journal
        assert "l" not in journal
        journal.add({"l": 2})
    assert path.read_bytes() == whole


@pytest.mark.parametrize("entry", [1, 2, 3])
def test_a_line_with_a_flipped_bit_is_dropped_with_all_after_it(tmp_path: Path, entry: int) -> None:
    with ResultLog(tmp_path / "answers-0.jsonl", RUN) as journal:
        for number in range(3):
            journal.add({f"k{number}": number})
    path = tmp_path / "answers-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[entry] = lines[entry].replace(b'result": ', b'result": 4')
    path.write_bytes(b"".join(lines))
    with ResultLog(tmp_path / "answers-0.jsonl", RUN) as journal:
        assert [f"k{number}" in journal for number in range(3)] == [number + 1 < entry for number in range(3)]
    assert path.read_bytes() == b"".join(lines[:entry])


def test_all_processes_answers_are_read_and_ones_own_written(tmp_path: Path) -> None:
    with ResultLog(tmp_path / "answers-0.jsonl", RUN) as journal:
        journal.add({"k": 1})
    with ResultLog(tmp_path / "answers-1.jsonl", RUN) as journal:
        assert "k" in journal
        journal.add({"l": 2})
    assert b'"l"' not in (tmp_path / "answers-0.jsonl").read_bytes()


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b'{"key": "another", "result": {}}\n'])
def test_what_no_log_has_written_is_dropped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "answers-0.jsonl"
    with ResultLog(path, RUN) as journal:
        journal.add({"k": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + line)
    with ResultLog(path, RUN) as journal:
        assert journal == {"k": 1}
    assert path.read_bytes() == whole


def test_another_runs_answers_are_refused(tmp_path: Path) -> None:
    ResultLog(tmp_path / "answers-0.jsonl", RUN).close()
    before = (tmp_path / "answers-0.jsonl").read_bytes()
    with pytest.raises(OutputError, match="has results of a run with another limit; use --overwrite or another"):
        ResultLog(tmp_path / "answers-0.jsonl", {**RUN, "limit": 4})
    assert (tmp_path / "answers-0.jsonl").read_bytes() == before


def test_requests_are_told_apart() -> None:
    assert key_of("choices", [1, 2], [3]) != key_of("choices", [1], [2, 3])
    assert key_of("choices", [1], [2]) != key_of("windows", [1], [2])


def test_batches_do_not_split_what_shares_a_pass() -> None:
    items = [(length, choice) for length in (3, 1, 2) for choice in range(4)]
    batches = list(batches_of(items, 2, lambda item: -item[0], lambda item: item[0]))
    assert [{length for length, _ in batch} for batch in batches] == [{3, 2}, {1}]
    assert sorted(item for batch in batches for item in batch) == sorted(items)


def test_a_batch_takes_half_of_the_memory_at_most() -> None:
    for free in (10**9, 4 * 10**10):
        size = fitting_batch(1024, 151_936, 2, free)
        assert size == 1 or size * 1024 * 151_936 * 10 <= free / 2
    assert fitting_batch(64, 4096, 2, 10**12) == 32
