"""Token ids in a NumPy file: which sequences they give, and what is said of files that hold something else."""

import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from namex_hf.calibration.text import CalibrationText
from namex_hf.calibration.token_ids import open_ids, text_of_ids
from namex_hf.errors import CalibrationError

VOCABULARY = 1000


def saved(path: Path, ids: Any) -> Path:
    np.save(path, ids)
    return path


def read(path: Path, tokens: int = 96, length: int = 8, seed: int = 0) -> CalibrationText:
    return text_of_ids(path, VOCABULARY, tokens, length, seed)


def test_sequences_are_cut_from_the_file_in_its_order(tmp_path: Path):
    """Every sequence begins at a multiple of the length; what is left over is no sequence."""
    text = read(saved(tmp_path / "ids.npy", np.arange(100)))
    assert text.ids.dtype == text.sources.dtype == torch.int64
    assert sorted(text.ids.tolist()) == [list(range(n, n + 8)) for n in range(0, 96, 8)]
    assert text.ids.tolist() != sorted(text.ids.tolist())
    assert text.sources.tolist() == [0] * 12
    assert (text.name, text.tokens) == ("ids.npy", 96)
    plain = struct.pack("<96q", *text.ids.flatten().tolist())
    assert text.sha256 == hashlib.sha256(plain).hexdigest()


def test_rows_are_joined(tmp_path: Path):
    """Whatever the rows' length, dtype, byte order and order in memory, the ids are the same text."""
    ids = np.arange(96)
    wanted = read(saved(tmp_path / "flat.npy", ids))
    others = [ids.reshape(6, 16), ids.reshape(32, 3).astype(">u2"), np.asfortranarray(ids.reshape(12, 8))]
    for number, other in enumerate(others):
        found = read(saved(tmp_path / f"{number}.npy", other))
        assert found.ids.equal(wanted.ids)
        assert found.sha256 == wanted.sha256


def test_the_seed_draws_from_all_of_the_file(tmp_path: Path):
    path = saved(tmp_path / "ids.npy", np.arange(VOCABULARY))
    drawn = [read(path, tokens=35, seed=seed) for seed in (0, 1, 0)]
    assert [len(text.ids) for text in drawn] == [4, 4, 4]
    assert all(len(set(text.ids.flatten().tolist())) == 32 for text in drawn)
    assert drawn[0].sha256 == drawn[2].sha256 != drawn[1].sha256
    assert max(int(read(path, tokens=8, seed=seed).ids.max()) for seed in range(20)) > VOCABULARY / 2


def test_the_last_eighth_is_held_back(tmp_path: Path):
    text = read(saved(tmp_path / "ids.npy", np.arange(128)), tokens=128)
    assert text.held_out.nonzero().flatten().tolist() == [14, 15]


def test_ids_are_those_of_the_model(tmp_path: Path):
    for wrong in (-1, VOCABULARY, 1 << 40):
        ids = np.arange(96)
        ids[50] = wrong
        path = saved(tmp_path / "ids.npy", ids)
        says = f"ids.npy has token id {wrong}; accepted: 0 to 999, below vocab_size in config.json$"
        with pytest.raises(CalibrationError, match=says):
            read(path)
        with pytest.raises(CalibrationError, match=says):  # also where that sequence is not drawn
            read(path, tokens=8)
    assert read(saved(tmp_path / "ids.npy", np.full(96, VOCABULARY - 1))).ids.max() == VOCABULARY - 1


def test_numbers_that_leave_no_sequence(tmp_path: Path):
    path = saved(tmp_path / "ids.npy", np.arange(96))
    with pytest.raises(CalibrationError, match="8 calibration tokens, and sequences of 9; accepted"):
        read(path, tokens=8, length=9)


class Bomb:
    """What is run where a pickle is loaded."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("loaded",)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def objects(path: Path) -> None:
    np.save(path, np.array([Bomb()] * 200, dtype=object), allow_pickle=True)


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, ids=np.arange(96))


def cut(path: Path) -> None:
    np.save(path, np.arange(96))
    path.write_bytes(path.read_bytes()[:-8])


def headed(path: Path, shape: tuple[int, ...]) -> None:
    """A header without data."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, r"cannot be read \(No such file"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: os.mkfifo(path), r"cannot be read \(a FIFO\)"),
        (lambda path: path.write_text("1 2 3"), "is no array that numpy.save wrote; accepted: integers"),
        (lambda path: path.touch(), "is no array that numpy.save wrote; accepted: integers"),
        (pickled, "is no array that numpy.save wrote; accepted: integers"),
        (archive, "is no array that numpy.save wrote; accepted: integers"),
        (objects, r"cannot be read \(ValueError: .*objects.*\); accepted: integers"),
        (cut, r"cannot be read \(ValueError: .*\); accepted: integers"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), r"cannot be read \(ValueError: .*\); accepted: integers"),
        (lambda path: headed(path, (1 << 62, 8)), r"cannot be read \(.*\); accepted: integers"),
        (lambda path: headed(path, (-96,)), r"cannot be read \(.*\); accepted: integers"),
        (lambda path: headed(path, (1 << 90,)), r"cannot be read \(.*\); accepted: integers"),
        (lambda path: np.save(path, np.zeros(96)), "holds float64; accepted: integers"),
        (lambda path: np.save(path, np.zeros(96, bool)), "holds bool; accepted: integers"),
        (lambda path: np.save(path, np.zeros(96, "m8[s]")), r"holds timedelta64\[s\]; accepted: integers"),
        (lambda path: np.save(path, np.array(["w"] * 96)), "holds <U1; accepted: integers"),
        (lambda path: np.save(path, np.zeros((96, 1, 1), int)), "has 3 axes; accepted: integers"),
        (lambda path: np.save(path, np.array(3)), "has 0 axes; accepted: integers"),
        (lambda path: np.save(path, np.arange(95)), "has 95 tokens, and 96 are asked for; accepted: up to 95"),
        (lambda path: np.save(path, np.arange(0)), "has 0 tokens, and 96 are asked for"),
    ],
)
def test_what_is_no_file_of_token_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], says: str
):
    """One line that names the file; nothing that a pickle asks for is done."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ids.npy"
    make(path)
    for reading in (lambda: open_ids(path, 96), lambda: read(path)):
        with pytest.raises(CalibrationError, match=f"ids.npy {says}") as caught:
            reading()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "loaded").exists()
