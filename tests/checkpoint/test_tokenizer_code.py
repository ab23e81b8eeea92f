"""Code of a tokenizer: which files belong to it, that they are carried and never run, and that the result opens."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.resolve import resolve
from namex_hf.checkpoint.tokenizer_code import LARGEST_CODE, carry_code, code_line, tokenizer_code
from namex_hf.errors import CheckpointError, OutputError
from tests.helpers.checkpoints import all_files
from tests.helpers.own_tokenizer import FILES, MARK, add_own_tokenizer

OPEN = """
import sys
from transformers import AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    print(type(tokenizer).__name__, tokenizer("w5 w7 none").input_ids)
"""
GROUPED = {"merge": "grouped", "experts": 3, "fit": "router", "fit_steps": 5, "calibration_tokens": 512}


@pytest.fixture
def source(odd, tmp_path: Path) -> Path:
    return add_own_tokenizer(Path(shutil.copytree(odd("qwen2_moe", torch.float32), tmp_path / "source")))


def test_the_code_is_carried_and_never_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte; in the result, stock or not, the tokenizer opens as in the source. Only that runs the code."""
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    np.save(tmp_path / "ids.npy", np.arange(1024) % 53)
    outs = [tmp_path / "stock", tmp_path / "own"]
    patch_checkpoint(source, outs[0], Recipe(**GROUPED, calibration_data=str(tmp_path / "ids.npy")))
    patch_checkpoint(source, outs[1])
    for out in outs:
        for name in (*FILES, "tokenizer_config.json", "vocab.txt"):
            assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "mark").exists()
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *map(str, (source, *outs))],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["OwnTokenizer [5, 7, 0]"] * 3, done.stderr
    assert (tmp_path / "mark").exists()


def test_the_card_says_what_the_tokenizer_needs(source: Path, tmp_path: Path) -> None:
    patch_checkpoint(source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "The tokenizer needs code of the original (`tokenization_own.py`, `pieces_own.py`), which was carried" in card
    )
    assert "AutoTokenizer" not in card


def write(folder: Path, auto_map: Any, **files: str | bytes) -> Path:
    """A folder with a tokenizer's configuration and files of code."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 9, "auto_map": auto_map}))
    for name, text in files.items():
        (folder / f"{name}.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def named(folder: Path) -> list[str]:
    return [path.name for path in tokenizer_code(folder)]


SLOW = {"AutoTokenizer": ["slow.Tok", None]}


@pytest.mark.parametrize(
    ("auto_map", "found"),
    [
        (SLOW, ["slow.py"]),
        ({"AutoTokenizer": ["slow.Tok", "fast.Tok"], "AutoProcessor": "other.P"}, ["slow.py", "fast.py"]),
        ({"AutoTokenizer": ["slow.Tok", "slow.FastTok"]}, ["slow.py"]),
        (["slow.Tok", None], ["slow.py"]),
        ({"AutoTokenizer": ["me/model--slow.Tok", None]}, []),
        ({"AutoTokenizer": ["slow.Tok", "me/model--fast.Tok"]}, []),
        ({"AutoTokenizer": ["slow.Tok", "gone.Tok"]}, []),
        ({"AutoTokenizer": ["large.Tok", None]}, []),
        ({"AutoTokenizer": ["../slow.Tok", None]}, []),
        ({"AutoTokenizer": ["sub.slow.Tok", None]}, []),
        ({"AutoTokenizer": ["slow", None]}, []),
        ({"AutoTokenizer": [3, None]}, []),
        ({"AutoTokenizer": [None, None]}, []),
        ({"AutoTokenizer": "slow.Tok"}, []),
        ({"AutoConfig": "slow.Config"}, []),
        ("slow.Tok", []),
        (None, []),
    ],
)
def test_what_the_configuration_names(tmp_path: Path, auto_map: Any, found: list[str]) -> None:
    """Where code is carried the pointer to it stays, and no other one; else none is left."""
    large = b"#" * (LARGEST_CODE + 1)
    folder, out = write(tmp_path / "in", auto_map, slow="a = 1", fast="", other="", large=large), tmp_path / "out"
    assert named(folder) == found
    out.mkdir()
    carry_code(folder, out)
    written = {path.name for path in out.iterdir()}
    assert written == {*found, "tokenizer_config.json"} if found else not written
    if found:
        kept = json.loads((out / "tokenizer_config.json").read_text())
        only = {"AutoTokenizer": auto_map["AutoTokenizer"]} if isinstance(auto_map, dict) else auto_map
        assert kept == {"model_max_length": 9, "auto_map": only}


def test_what_the_code_imports(tmp_path: Path) -> None:
    """From beside it, at any place in it, and so on from there; nothing else."""
    slow = """
from .near import a, b
from . import beside
from ..above import c
from .deep.er import d
from other import e
import whole
def late():
    from .far import f
# from .comment import g
text = "from .text import h"
from .gone import i
from .large import j
"""
    files = dict.fromkeys(("beside", "above", "deep", "other", "whole", "comment", "text"), "")
    near = "from .slow import a\nfrom .far import b\nx = '\\d'"
    large = b"#" * (LARGEST_CODE + 1)
    folder = write(
        tmp_path / "in", SLOW, slow=slow, near=near, far="from .last import c", last="", large=large, **files
    )
    assert named(folder) == ["slow.py", "near.py", "far.py", "last.py"]
    assert code_line(folder).endswith(", and was not run: slow.py, near.py, far.py, last.py")


@pytest.mark.parametrize(
    "text",
    [
        b"from .near import",
        b"\xff\xfe\x00",
        b"x = '\x00'",
        b"# coding: none\n",
        b"-" * (LARGEST_CODE - 1) + b"1",
        b"(" * LARGEST_CODE,
        b"a" + b".a" * (LARGEST_CODE // 2 - 1),
        b"a = 1" + b" + 1" * (LARGEST_CODE // 5),
    ],
)
def test_what_is_no_python_is_carried_without_a_look_inside(tmp_path: Path, text: bytes) -> None:
    assert named(write(tmp_path / "in", SLOW, slow=text, near="")) == ["slow.py"]


def leave(path: Path, secret: Path) -> None:
    path.unlink()
    path.symlink_to(secret)


def pipe(path: Path, secret: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(("make", "kind"), [(leave, "a link that leaves the folder"), (pipe, "no regular file")])
@pytest.mark.parametrize("name", FILES)
def test_no_link_is_followed_out_of_the_source(
    source: Path, tmp_path: Path, make: Callable[[Path, Path], None], kind: str, name: str
) -> None:
    """Refused before a byte is written."""
    (tmp_path / "secret").write_text("mine alone")
    make(source / name, tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name} is {kind}; needed: the file itself"):
        resolve(source)
    with pytest.raises(CheckpointError, match=f"{name} is {kind}"):
        patch_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_code_is_another_source(source: Path, tmp_path: Path) -> None:
    patch_checkpoint(source, tmp_path / "out")
    before = all_files(tmp_path / "out")
    (source / FILES[1]).write_text("def read_pieces(path):\n    return {}\n")
    with pytest.raises(OutputError, match=r"another source; .*\(pieces_own.py: other bytes\)"):
        patch_checkpoint(source, tmp_path / "out")
    assert all_files(tmp_path / "out") == before
