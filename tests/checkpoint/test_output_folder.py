"""The output folder: whose it may be, what is refused without a touch, the lock, and a disk that runs full."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.folder import OutputFolder
from namex_hf.errors import OutputError
from namex_hf.progress import ProgressEvent
from tests.helpers.checkpoints import all_files, settled_files
from tests.helpers.killing import hold_folder, run
from tests.helpers.process import SERVER, script_process
from tests.helpers.toy_models import odd_checkpoint

GROUPED = Recipe(merge="grouped", experts=3)


@pytest.fixture
def source(odd) -> Path:
    return odd("qwen2_moe", torch.bfloat16)


def test_foreign_folder_is_left_alone(source: Path, tmp_path: Path) -> None:
    """Whatever is not ours: refused, with and without ``overwrite``, and nothing in it changes."""
    contents = {
        "note.txt": "mine",
        "config.json": "{}",
        "namex/report.json": "[]",
        "namex/report.json/x": "a folder of that name",
        ".namex/mine": "mine",
        ".namex/run.json": "no json",
        ".namex/lock/x": "mine",
    }
    for number, (name, text) in enumerate(contents.items()):
        out = tmp_path / str(number)
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text(text)
        before = all_files(out)
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="something else"):
                patch_checkpoint(source, out, overwrite=overwrite)
        assert all_files(out) == before


def test_a_file_is_no_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        patch_checkpoint(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_the_models_own_folder(tmp_path: Path) -> None:
    """``out`` may be neither the model's folder nor lie in it or around it, symlinks seen through."""
    source = odd_checkpoint(tmp_path / "around" / "model", "deepseek")
    (tmp_path / "link").symlink_to(source)
    before = all_files(tmp_path / "around")
    outs = [source, source / "out", source / "a" / "b", source.parent, tmp_path / "link", tmp_path / "link" / "out"]
    for out in outs:
        with pytest.raises(OutputError, match="another folder is needed"):
            patch_checkpoint(source, out, overwrite=True)
    with pytest.raises(OutputError, match="another folder is needed"):
        patch_checkpoint(tmp_path / "link", source / "out")
    assert all_files(tmp_path / "around") == before
    patch_checkpoint(source, tmp_path / "around" / "model-patched")  # beside it, and of a similar name


def test_empty_folder_and_missing_parents(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    patch_checkpoint(source, tmp_path / "empty")
    patch_checkpoint(source, tmp_path / "a" / "b" / "c")
    assert settled_files(tmp_path / "empty") == settled_files(tmp_path / "a" / "b" / "c")


def test_complete_folder(source: Path, tmp_path: Path) -> None:
    """The same call again returns the report and changes no file."""
    report = patch_checkpoint(source, tmp_path / "out")
    before = all_files(tmp_path / "out")
    again = patch_checkpoint(source, tmp_path / "out", Recipe(device="cpu"))
    assert json.loads(again.to_json()) == json.loads(report.to_json())
    assert all_files(tmp_path / "out") == before


def test_another_run_is_refused(odd, source: Path, tmp_path: Path) -> None:
    """Another recipe, source or shard size: refused by name, nothing touched; replaced with ``overwrite``."""
    patch_checkpoint(source, tmp_path / "out")
    before = all_files(tmp_path / "out")
    other = odd("qwen2_moe", torch.bfloat16, seed=0, num_hidden_layers=5)
    for word, model, recipe, size in (
        ("recipe", source, GROUPED, "5GB"),
        ("recipe", source, Recipe(gamma=0.5), "5GB"),
        ("source", other, Recipe(), "5GB"),
        ("shard_size", source, Recipe(), "1GB"),
    ):
        with pytest.raises(OutputError, match=word):
            patch_checkpoint(model, tmp_path / "out", recipe, shard_size=size)
        assert all_files(tmp_path / "out") == before
    patch_checkpoint(source, tmp_path / "out", GROUPED, overwrite=True)
    patch_checkpoint(source, tmp_path / "fresh", GROUPED)
    assert settled_files(tmp_path / "out") == settled_files(tmp_path / "fresh")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "fresh").iterdir()}


def test_bad_input_is_no_reason_to_touch_a_folder(source: Path, tmp_path: Path) -> None:
    """A recipe that does not fit is refused before the folder is looked at, though ``overwrite`` would take it."""
    patch_checkpoint(source, tmp_path / "out")
    before = all_files(tmp_path / "out")
    with pytest.raises(Exception, match="experts"):
        patch_checkpoint(source, tmp_path / "out", Recipe(merge="grouped", experts=8), overwrite=True)
    assert all_files(tmp_path / "out") == before


def test_two_runs_on_one_folder(source: Path, tmp_path: Path) -> None:
    """While a run is under way a second process is refused with status 2; the first ends as if it were alone."""
    out, log, answers = tmp_path / "out", tmp_path / "log", []
    command = ["patch", str(source), "--out", str(out), "--quiet"]

    def meanwhile(event: ProgressEvent) -> None:
        if not answers and str(event).startswith("layer"):
            process = script_process("namex_hf", command, log)
            process.join()
            answers.append(process.exitcode)

    patch_checkpoint(source, out, progress=meanwhile)
    assert answers == [2]
    assert "in use by another run" in log.read_text()
    assert log.read_text().count("\n") == 1
    patch_checkpoint(source, tmp_path / "alone")
    assert settled_files(out) == settled_files(tmp_path / "alone")


def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    """Held by another process: refused. That process killed: free."""
    claimed, release = SERVER.Event(), SERVER.Event()
    process = SERVER.Process(target=hold_folder, args=(tmp_path / "out", claimed, release))
    process.start()
    claimed.wait()
    folder = OutputFolder(tmp_path / "out", {"recipe": 1})
    with pytest.raises(OutputError, match="in use"), folder.claimed(overwrite=True):
        pass
    process.kill()
    process.join()
    with folder.claimed(overwrite=False):
        assert not folder.complete


def test_too_little_room(tmp_path: Path) -> None:
    """Said before anything is made, with what there is and what it takes; the folder need not exist."""
    folder = OutputFolder(tmp_path / "not" / "yet", {})
    folder.check_space(1)
    with pytest.raises(OutputError, match=r"GB free; the run needs 1000000000\.00 GB"):
        folder.check_space(10**18)
    assert not (tmp_path / "not").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 72 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can be mounted by root alone")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as ballast:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    ballast.write(b"\0" * size)
            except OSError:
                continue


@pytest.mark.parametrize("recipe", [Recipe(), GROUPED, Recipe(method="smoe")], ids=["residual", "grouped", "smoe"])
def test_disk_runs_full(odd, tmp_path: Path, small_disk: Path, recipe: Recipe) -> None:
    """At any moment: an `OutputError` that says so, no model, and with room again the same call finishes."""
    source = odd("qwen2_moe", torch.bfloat16, num_hidden_layers=6, tokenizer=True)
    run(source, tmp_path / "undisturbed", recipe, shard_size="20KB")
    steps: list[str] = []
    patch_checkpoint(source, tmp_path / "counted", recipe, shard_size="20KB", progress=lambda e: steps.append(str(e)))
    lot = random.Random(11)
    for number, moment in enumerate([1, *sorted(lot.sample(range(2, len(steps) - 1), 4)), len(steps)]):
        seen = 0

        def filling(event: ProgressEvent, moment: int = moment) -> None:
            nonlocal seen
            seen += 1
            if seen == moment:
                fill(small_disk / "ballast")

        out = small_disk / str(number)
        with pytest.raises(OutputError, match="disk is full"):
            patch_checkpoint(source, out, recipe, shard_size="20KB", progress=filling)
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)
        (small_disk / "ballast").unlink()
        patch_checkpoint(source, out, recipe, shard_size="20KB")
        assert settled_files(out) == settled_files(tmp_path / "undisturbed")
        assert not list(out.rglob("*.part"))


def test_no_room_before_the_start(source: Path, small_disk: Path) -> None:
    fill(small_disk / "ballast")
    with pytest.raises(OutputError, match="free; the run needs"):
        patch_checkpoint(source, small_disk / "out")
    assert not (small_disk / "out").exists()
