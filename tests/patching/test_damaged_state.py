"""Files of an unfinished run that were damaged: noticed, and the result is that of an undisturbed run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from namex_hf import Recipe, patch_checkpoint
from namex_hf.errors import OutputError
from namex_hf.progress import ProgressEvent
from tests.helpers.checkpoints import settled_files

SHARD_SIZE = "100KB"


class Stop(BaseException):
    """As a kill: nothing handles it."""


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(b"\xff\x00garbage" * 40),
    "flipped": flipped,
    "lying": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
}


@dataclass(frozen=True)
class Begun:
    source: Path
    recipe: Recipe
    undisturbed: Path
    stopped: Path


@pytest.fixture(scope="module", params=["residual", "grouped", "calibrated", "kept"])
def begun(request: pytest.FixtureRequest, odd: Callable[..., Path], words: Path, tmp_path_factory: Any) -> Begun:
    """A run that was stopped in its middle: where layers, stream or walk, and a shard or two are there."""
    import torch

    sizes = {"hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 6}
    source = odd("deepseek", torch.bfloat16, shards=3, tokenizer=True, **sizes)
    text = {"calibration_data": str(words), "calibration_tokens": 512}
    recipe, what = {
        "residual": (Recipe(), "layer 4"),
        "grouped": (Recipe(merge="grouped", experts=4), "layer 4"),
        "calibrated": (Recipe(merge="grouped", experts=4, fit="router", fit_steps=5, **text), "layer 3"),
        "kept": (Recipe(merge="soft", routing="stable", **text), "layer 3"),
    }[request.param]
    folder = tmp_path_factory.mktemp("state")
    patch_checkpoint(source, folder / "undisturbed", recipe, shard_size=SHARD_SIZE)

    def stop(event: ProgressEvent) -> None:
        if str(event) == what:
            raise Stop

    with pytest.raises(Stop):
        patch_checkpoint(source, folder / "stopped", recipe, shard_size=SHARD_SIZE, progress=stop)
    return Begun(source, recipe, folder / "undisturbed", folder / "stopped")


def finished(begun: Begun, out: Path) -> None:
    patch_checkpoint(begun.source, out, begun.recipe, shard_size=SHARD_SIZE)
    assert settled_files(out) == settled_files(begun.undisturbed)
    one, other = (json.loads((folder / "namex/report.json").read_text()) for folder in (out, begun.undisturbed))
    assert one["files"] == other["files"]
    assert [{**layer, "seconds": 0} for layer in one["layers"]] == [
        {**layer, "seconds": 0} for layer in other["layers"]
    ]
    assert not (out / ".namex").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_the_state(begun: Begun, tmp_path: Path, damage: str) -> None:
    """Each kind of file in turn: a layer's, the stream or the walk, and the lists of hashes."""
    kinds = {path.name.split("-")[0]: path for path in sorted((begun.stopped / ".namex").iterdir())}
    assert {"layer", "shards.json", "digests.json"} <= kinds.keys() | {"shards.json"}
    for kind, path in kinds.items():
        if kind in ("run.json", "lock"):
            continue
        out = Path(shutil.copytree(begun.stopped, tmp_path / kind))
        DAMAGE[damage](out / ".namex" / path.name)
        finished(begun, out)


def test_a_state_of_an_earlier_release(begun: Begun, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its files state no format, and may have other names: the run begins anew."""
    out = Path(shutil.copytree(begun.stopped, tmp_path / "out"))
    for path in (out / ".namex").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = {name: value for name, value in file.metadata().items() if name != "format"}
        save_file(load_file(path), path, metadata)
    finished(begun, out)
    assert "begins anew" in caplog.text


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_of_an_unfinished_run(begun: Begun, tmp_path: Path, damage: str) -> None:
    for number, path in enumerate(sorted(begun.stopped.glob("model*.safetensors"))):
        out = Path(shutil.copytree(begun.stopped, tmp_path / str(number)))
        DAMAGE[damage](out / path.name)
        finished(begun, out)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("gone", "flipped")])
def test_a_run_that_does_not_say_which_it_is(begun: Begun, tmp_path: Path, damage: str) -> None:
    """Refused in a line; ``overwrite`` makes it anew."""
    out = Path(shutil.copytree(begun.stopped, tmp_path / "out"))
    DAMAGE[damage](out / ".namex/run.json")
    with pytest.raises(OutputError, match=r"run\.json is damaged; use --overwrite or another folder$"):
        patch_checkpoint(begun.source, out, begun.recipe, shard_size=SHARD_SIZE)
    patch_checkpoint(begun.source, out, begun.recipe, shard_size=SHARD_SIZE, overwrite=True)
    finished(begun, out)
