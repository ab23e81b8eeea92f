"""What others have written is read in bounds: regular files, of a size, depth and time."""

import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from namex_hf.checkpoint.source import open_checkpoint
from namex_hf.errors import CheckpointError, OutputError, RecipeError
from namex_hf.files import (
    DEEPEST,
    LARGEST,
    LARGEST_RECIPE,
    bounded_lines,
    check_name,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
)
from namex_hf.plain_yaml import parse_yaml
from namex_hf.recipe import read_yaml


@pytest.fixture(autouse=True)
def guarded() -> Iterator[None]:
    """A read that waits for ever ends this process: SIGALRM has no handler here."""
    signal.alarm(120)
    yield
    signal.alarm(0)


def a_socket(path: Path) -> None:
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{short}/s")  # a socket's path has at most 107 bytes
        Path(f"{short}/s").rename(path)


def large(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)  # of zeros, which take no room


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "cannot be read (a FIFO); accepted: a regular file"),
    "socket": (a_socket, "cannot be read (a socket or a device); accepted: a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "cannot be read (a device); accepted: a regular file"),
    "terminal": (lambda path: path.symlink_to("/dev/ptmx"), "cannot be read (a device); accepted: a regular file"),
    "folder": (Path.mkdir, "cannot be read (Is a directory); accepted: a regular file"),
    "circle": (lambda path: path.symlink_to(path.name), "cannot be read (Too many levels of symbolic links)"),
    "nothing": (lambda path: None, "cannot be read (No such file or directory)"),
    "1 GiB": (large, f"has 1,073,741,824 bytes; accepted: up to {LARGEST:,}"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_small_file(kind: str, tmp_path: Path) -> None:
    make, says = KINDS[kind]
    path = tmp_path / "in.json"
    make(path)
    for read in (read_json, read_text, read_bytes):
        with pytest.raises(RecipeError) as caught:
            read(path, RecipeError)
        assert str(caught.value) == f"{path} {says}"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder", "circle"])
def test_files_of_a_checkpoint(kind: str, name: str, tmp_path: Path, odd: Callable[..., Path]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in odd("qwen2_moe").iterdir():
        if path.name != name:
            (folder / path.name).symlink_to(path)
    KINDS[kind][0](folder / name)
    with pytest.raises(
        CheckpointError, match=r"cannot be read|is missing|neither model|is a link that leaves|is no regular file"
    ):
        open_checkpoint(folder)


def test_a_name_with_a_nul() -> None:
    with pytest.raises(
        CheckpointError, match=r"a\\x00b cannot be read \((open: )?embedded null (byte|character in path)\)"
    ):
        open_regular(Path("a\0b"))


@pytest.mark.parametrize("depth", [DEEPEST + 1, 1000, 100_000])
@pytest.mark.parametrize(("begin", "end"), [('{"a":', "}"), ("[", "]")])
def test_json_that_is_nested_deep(begin: str, end: str, depth: int) -> None:
    text = depth * begin + "1" + depth * end
    for form in (text, text.encode()):
        with pytest.raises(CheckpointError, match=f"^x is .*nested deeper than {DEEPEST} lists and objects$"):
            parse_json(form, "x")


def test_json_that_is_long_and_flat() -> None:
    depth = DEEPEST - 1
    text = f"[{','.join(1000 * ['{}'])},{depth * '['}{depth * ']'}]"
    assert len(parse_json(text, "x")) == 1001
    with pytest.raises(CheckpointError, match="is no JSON: Exceeds the limit"):
        parse_json(5000 * "9", "x")


def test_lines_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"{}\n[]")
    with open_regular(path) as file:
        assert list(bounded_lines(file, path, CheckpointError)) == [b"{}\n", b"[]"]
    os.truncate(path, 1 << 30)
    with (
        open_regular(path) as file,
        pytest.raises(CheckpointError, match=rf"lines.jsonl, line 2 has more than {LARGEST:,}"),
    ):
        list(bounded_lines(file, path, CheckpointError))


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, r"aliases \(\*name\) are not accepted"),
        ("a: &a [*a]\n", r"aliases \(\*name\) are not accepted"),
        (f"a: {DEEPEST * '['}{DEEPEST * ']'}", f"nested deeper than {DEEPEST}"),
        (f"a: {30_000 * '['}", f"nested deeper than {DEEPEST}"),
        (f"seed: {10**30}", "a whole number of 100 bits; accepted: up to 64"),
        (f"seed: {5000 * '9'}", "Exceeds the limit"),
        (f"a: {LARGEST_RECIPE * 'x'}", f"accepted: up to {LARGEST_RECIPE:,}"),
    ],
)
def test_recipes(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"^recipe file .*recipe.yaml cannot be read: .*{says}"):
        read_yaml(path)


def test_yaml_that_is_accepted() -> None:
    text = "merge: soft\nseed: 255\nlist: [[1], {a: [2.5, null, true]}]\n"
    assert parse_yaml(text) == {"merge": "soft", "seed": 255, "list": [[1], {"a": [2.5, None, True]}]}
    with pytest.raises(yaml.YAMLError):
        parse_yaml("!!python/object:os.system {}")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a\0b", "has a NUL in it"),
        ("caf\udce9", "is not UTF-8"),
        ("loop/out", "Too many levels"),
        (300 * "x", "too long"),
    ],
)
def test_names_of_folders(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match=says):
        check_name(tmp_path / name, OutputError)
    check_name(tmp_path / "new" / "out", OutputError)
