"""Calibrated runs that are killed by SIGKILL: among the layers, between two files of a layer, and among the shards."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from namex_hf import Recipe, load_patched, patch_checkpoint
from namex_hf.errors import CheckpointError, OutputError
from tests.helpers.checkpoints import all_files, settled_files
from tests.helpers.killing import Killing, kill_after, run, settled, start
from tests.helpers.toy_models import write_words

OPTIONS: dict[str, Any] = {"shard_size": "100KB", "export_as": "qwen2_moe"}
STREAM = ".namex/arrived.safetensors"
TRIES = 5


@pytest.fixture
def recipe(words: Path) -> Recipe:
    return Recipe(
        merge="grouped", experts=4, fit="router", fit_steps=25, calibration_data=str(words), calibration_tokens=512
    )


def killed(source: Path, out: Path, recipe: Recipe, what: str, times: int = 1) -> None:
    """A run that is killed when it tells of ``what``; it leaves no model."""
    process = start(source, out, recipe, progress=Killing(what, times), **OPTIONS)
    process.join()
    assert process.exitcode == -9, f"the run was not killed: it ended with {process.exitcode}"
    assert (out / ".namex" / "run.json").is_file()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(CheckpointError):
        load_patched(out)


def layers_made(source: Path, out: Path, recipe: Recipe) -> list[int]:
    """Run in this process to the end; the layers that were read for it."""
    told: list[str] = []
    patch_checkpoint(source, out, recipe, progress=lambda event: told.append(str(event)), **OPTIONS)
    assert not (out / ".namex").exists()
    assert not list(out.rglob("*.part"))
    return [int(what.split()[1].rstrip(":")) for what in told if what.endswith(": read")]


def test_killed_again_and_again(long_checkpoint: Path, tmp_path: Path, recipe: Recipe) -> None:
    """Six moments one after the other; what was finished is not made again, and all is as undisturbed."""
    out = tmp_path / "killed"
    run(long_checkpoint, tmp_path / "undisturbed", recipe, **OPTIONS)
    moments = [("checking", 3), ("layer 1: read", 1), ("layer 2", 1), ("layer 5: router", 2), ("layer 9: merged", 1)]
    for what, times in moments:
        killed(long_checkpoint, out, recipe, what, times)
    assert layers_made(long_checkpoint, out, recipe) == [9, 10, 11, 12]
    wanted = settled_files(tmp_path / "undisturbed")
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 4
    assert {"config.json", "namex/recipe.yaml", "namex/statistics.safetensors"} < set(wanted)
    assert settled_files(out) == wanted
    load_patched(out)
    one, other = (json.loads((folder / "namex/report.json").read_text()) for folder in (out, tmp_path / "undisturbed"))
    assert [{**layer, "seconds": 0} for layer in one["layers"]] == [
        {**layer, "seconds": 0} for layer in other["layers"]
    ]


def test_killed_while_a_layer_is_fitted(long_checkpoint: Path, tmp_path: Path, recipe: Recipe) -> None:
    """In the middle of it and after it: the text, as the original has it too, goes on from the layer that is whole."""
    out, recipe = tmp_path / "killed", replace(recipe, fit="layer", fit_steps=4, target="model")
    run(long_checkpoint, tmp_path / "undisturbed", recipe, **OPTIONS)
    killed(long_checkpoint, out, recipe, "layer 3: fitted, step 4 of 4")
    killed(long_checkpoint, out, recipe, "layer 7: layer")
    stream = load_file(out / STREAM)
    assert stream["hidden"].shape == stream["original"].shape == (8, 64, 64)
    assert not stream["hidden"].equal(stream["original"])
    assert layers_made(long_checkpoint, out, recipe) == list(range(7, 13))
    assert settled_files(out) == settled_files(tmp_path / "undisturbed")


def test_killed_between_a_layer_and_the_stream_above_it(long_checkpoint: Path, tmp_path: Path, recipe: Recipe) -> None:
    """The layer is there, the text has not gone through it yet: it is made again, to the same bytes."""
    out, earlier = tmp_path / "killed", tmp_path / "stream"
    run(long_checkpoint, tmp_path / "undisturbed", recipe, **OPTIONS)
    killed(long_checkpoint, out, recipe, "layer 3")
    shutil.copy(out / STREAM, earlier)
    killed(long_checkpoint, out, recipe, "layer 4")
    shutil.copy(earlier, out / STREAM)
    assert (out / ".namex" / "layer-00004.safetensors").is_file()
    assert layers_made(long_checkpoint, out, recipe) == list(range(4, 13))
    assert settled_files(out) == settled_files(tmp_path / "undisturbed")


def test_killed_among_the_shards(long_checkpoint: Path, tmp_path: Path, recipe: Recipe) -> None:
    """When all layers are made, and when the first shards are whole: these are kept."""
    out, lot = tmp_path / "killed", random.Random(3)
    run(long_checkpoint, tmp_path / "undisturbed", recipe, **OPTIONS)
    killed(long_checkpoint, out, recipe, "layer 12")
    made, begun = settled(out), tmp_path / "begun"
    shutil.copytree(out, begun)
    for shards in (1, 3, 5):
        for _ in range(TRIES):
            if kill_after(start(long_checkpoint, out, recipe, **OPTIONS), out, made + shards, lot):
                break
            shutil.rmtree(out)  # on a busy machine the signal may come when all is over: again
            shutil.copytree(begun, out)
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("model-*.safetensors")}
    assert whole
    assert layers_made(long_checkpoint, out, recipe) == []
    assert settled_files(out) == settled_files(tmp_path / "undisturbed")
    assert whole.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("model-*.safetensors")}.items()


def test_another_text_is_another_run(long_checkpoint: Path, tmp_path: Path, words: Path, recipe: Recipe) -> None:
    """Refused on the folder that was begun, and on the complete one; nothing is touched. Only the name's folder may
    differ."""
    out, other, same = tmp_path / "out", tmp_path / "other" / words.name, tmp_path / "same" / words.name
    other.parent.mkdir()
    same.parent.mkdir()
    write_words(other, seed=2)
    shutil.copy(words, same)
    killed(long_checkpoint, out, recipe, "layer 2: down")
    others = {
        "calibration (sha256)": replace(recipe, calibration_data=str(other)),
        "calibration (sha256) and recipe (seed)": replace(recipe, seed=1),
        "calibration (sha256, tokens) and recipe (calibration_tokens)": replace(recipe, calibration_tokens=1024),
        "recipe (calibrate)": replace(recipe, calibrate="before", target=None),
    }
    for _ in range(2):
        before = all_files(out)
        for what, another in others.items():
            with pytest.raises(OutputError, match=re.escape(f"belongs to a run with another {what};")):
                patch_checkpoint(long_checkpoint, out, another, **OPTIONS)
        assert all_files(out) == before
        patch_checkpoint(long_checkpoint, out, replace(recipe, calibration_data=str(same)), **OPTIONS)
        assert (out / "config.json").is_file()
    before = all_files(out)
    patch_checkpoint(long_checkpoint, out, recipe, **OPTIONS)
    assert all_files(out) == before
