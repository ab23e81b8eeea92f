"""Runs that are killed by SIGKILL in their middle: no model is left, and the same run finishes the same bytes."""

import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from namex_hf import Recipe, load_patched
from namex_hf.commands import patch
from namex_hf.progress import ProgressEvent
from tests.helpers.checkpoints import settled_files
from tests.helpers.killing import TRIES, is_clean, is_no_model, kill_after, run, settled, start
from tests.helpers.process import SERVER


def weights(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("model-*.safetensors")}


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (Recipe(base="shared", every=2, momentum="quaternion"), {"shard_size": "60KB"}),
        (Recipe(method="camex", base="first"), {"shard_size": "60KB"}),
        (Recipe(merge="grouped", experts=4), {"shard_size": "200KB"}),
        (Recipe(merge="grouped", experts=2), {"shard_size": "300KB", "export_as": "qwen2_moe"}),
        (Recipe(method="smoe", routing="cosine"), {"shard_size": "10KB"}),
        (Recipe(merge="soft", curvature="kronecker", rank=2, routing="cosine"), {"shard_size": "300KB"}),
        (Recipe(merge="grouped", experts=4, routing="cosine"), {"shard_size": "200KB"}),
    ],
    ids=["residual", "camex", "grouped", "exported", "cosine", "kronecker", "grouped-cosine"],
)
def test_killed_again_and_again(long_checkpoint: Path, tmp_path: Path, recipe: Recipe, options: Any) -> None:
    """Three kills at moments drawn by lot; what was whole is kept, the rest is made, and all is as undisturbed."""
    lot, out = random.Random(f"{recipe}"), tmp_path / "killed"
    run(long_checkpoint, tmp_path / "undisturbed", recipe, **options)
    for files in sorted(lot.sample(range(3, 22), 3)):
        for _ in range(TRIES):
            if kill_after(start(long_checkpoint, out, recipe, **options), out, files, lot):
                break
            shutil.rmtree(out)  # on a busy machine the signal may come when all is over: again, from the beginning
        is_no_model(out)
    before = weights(out)
    run(long_checkpoint, out, recipe, **options)
    assert settled_files(out) == settled_files(tmp_path / "undisturbed")
    assert before.items() <= weights(out).items(), "a shard that was whole has been written again"
    load_patched(out)
    is_clean(out)


def command(arguments: list[str]) -> None:
    sys.exit(patch.main(arguments))


def test_killed_command(long_checkpoint: Path, tmp_path: Path) -> None:
    """``namex-patch`` itself: killed, run again, and run once more on what is complete."""
    out, lot = tmp_path / "killed", random.Random(7)
    arguments = [str(long_checkpoint), "--out", str(out), "--merge", "grouped", "--experts", "3"]
    arguments += ["--shard-size", "200KB", "--quiet"]
    run(long_checkpoint, tmp_path / "undisturbed", Recipe(merge="grouped", experts=3), shard_size="200KB")
    for _ in range(TRIES):
        process, wanted = SERVER.Process(target=command, args=(arguments,)), lot.randrange(3, 12)
        process.start()
        while process.is_alive() and settled(out) < wanted:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        if not (out / "config.json").exists():
            break
        shutil.rmtree(out)
    is_no_model(out)
    again = SERVER.Process(target=command, args=(arguments,))
    again.start()
    again.join()
    assert again.exitcode == 0
    assert settled_files(out) == settled_files(tmp_path / "undisturbed")
    is_clean(out)


def test_killed_while_replacing_another(long_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``overwrite``, stopped after any one deletion: what is left is never a model, and the same call finishes it."""
    from namex_hf import patch_checkpoint
    from namex_hf.errors import OutputError

    first, second = Recipe(merge="grouped", experts=2), Recipe(merge="grouped", experts=3)
    patch_checkpoint(long_checkpoint, tmp_path / "undisturbed", second)
    for last in (1, 2, 4, 100):
        out = tmp_path / f"over{last}"
        patch_checkpoint(long_checkpoint, out, first)
        with monkeypatch.context() as stopped:
            stopped.setattr(Path, "unlink", _stopping(last))
            with pytest.raises(KeyboardInterrupt):
                patch_checkpoint(long_checkpoint, out, second, overwrite=True, progress=_stop)
        is_no_model(out)
        with pytest.raises(OutputError):
            patch_checkpoint(long_checkpoint, out, first)
        patch_checkpoint(long_checkpoint, out, second, overwrite=True)
        assert settled_files(out) == settled_files(tmp_path / "undisturbed")
        is_clean(out)


def _stopping(last: int) -> Callable[..., None]:
    """`Path.unlink` that stops the program, as a signal would, after so many deletions."""
    unlink, count = Path.unlink, 0

    def counting(path: Path, missing_ok: bool = False) -> None:
        nonlocal count
        unlink(path, missing_ok)
        count += 1
        if count == last:
            raise KeyboardInterrupt

    return counting


def _stop(event: ProgressEvent) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "run.json.part"]], ids=str)
def test_killed_before_it_said_which_run(long_checkpoint: Path, tmp_path: Path, left: list[str]) -> None:
    """Between making the folder and naming the run: the same command goes on (and so may any other)."""
    (tmp_path / "out" / ".namex").mkdir(parents=True)
    for name in left:
        (tmp_path / "out" / ".namex" / name).write_text("{")
    run(long_checkpoint, tmp_path / "out", Recipe())
    is_clean(tmp_path / "out")
