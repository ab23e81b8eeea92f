"""``moments=``: neurons are chosen by what another run of the same source and text measured, at any width."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import CheckpointError, OutputError, RecipeError, UsageError
from namex_hf.patching.estimate import peak_bytes, space_needed
from namex_hf.patching.plan import make_plan
from namex_hf.record import Report
from tests.helpers.checkpoints import (
    all_files,
    differing,
    moe_layers,
    read_config,
    read_tensors,
    settled_files,
    write_folder,
)
from tests.helpers.killing import Killing, run, start
from tests.helpers.recipes import WIDE
from tests.helpers.toy_models import add_tokenizer

TOKENS = 512


def recipe_on(words: Path, width: int, **fields: Any) -> Recipe:
    text = {"calibration_data": str(words), "calibration_tokens": TOKENS, "calibrate": "before", "sweeps": 0}
    return Recipe(merge="narrow", width=width, **{**text, **fields})


def without_report(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in settled_files(folder).items() if "report" not in name}


def with_loud_neuron(source: Path, folder: Path) -> Path:
    """A copy with a super expert in the last layer, of which a neuron answers a thousand times as loud."""
    tensors = read_tensors(source)
    name = max(name for name in tensors if name.endswith("experts.2.down_proj.weight"))
    tensors[name] = tensors[name].clone()
    tensors[name][:, 5] *= 1000
    add_tokenizer(write_folder(folder, read_config(source), tensors))
    return folder


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
@pytest.mark.parametrize(
    "fields", [{}, {"neurons": "energy", "error_weights": "sequence"}, {"neurons": "random"}], ids=str
)
def test_several_widths_from_one_reading(
    odd: Callable[..., Path], words: Path, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    """Each as the run of its width alone; the text passes through the model once, and errors are not measured."""
    source = with_loud_neuron(odd(family, torch.bfloat16, tokenizer=True, **WIDE), tmp_path / "in")
    moments = tmp_path / "moments"
    told: list[str] = []
    first = patch_checkpoint(source, tmp_path / "first", recipe_on(words, 16, **fields), moments=moments)
    for width in (9, 20):
        out, own = tmp_path / f"{width}", tmp_path / f"{width}-alone"
        recipe = recipe_on(words, width, **fields)
        again = patch_checkpoint(source, out, recipe, moments=moments, progress=lambda event: told.append(str(event)))
        alone = patch_checkpoint(source, own, recipe)
        assert without_report(out) == without_report(own)
        for layers in (first.layers, alone.layers):
            for name in ("usage", "mass", "peaks", "super_experts"):
                assert [layer[name] for layer in again.layers] == [layer[name] for layer in layers]
        assert all(layer["errors"] for layer in alone.layers)
        assert all(layer["errors"] == [] for layer in again.layers)
    assert any(layer["super_experts"] == [2] for layer in first.layers)
    assert told
    assert not any(what.endswith(": read") for what in told)


def test_moments_of_something_else_are_refused(odd: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    source, out, moments = odd("deepseek", torch.bfloat16, tokenizer=True), tmp_path / "out", tmp_path / "moments"
    patch_checkpoint(source, tmp_path / "first", recipe_on(words, 4), moments=moments)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "generation_config.json").write_text('{"top_k": 3}')
    kept = all_files(moments)

    def refused(match: str, recipe: Recipe, of: Path = source, folder: Path = moments) -> None:
        with pytest.raises((CheckpointError, RecipeError, OutputError), match=match):
            patch_checkpoint(of, out, recipe, moments=folder)
        assert not out.exists()
        assert all_files(moments) == kept

    refused(r"measured with another calibration \(sha256\)$", recipe_on(words, 3, seed=1))
    refused(r"measured with another error_weights$", recipe_on(words, 3, error_weights="source"))
    refused(r"measured with another source", recipe_on(words, 3), of=other)
    refused("holds other files; accepted: a new folder", recipe_on(words, 3), folder=tmp_path / "first")
    for more in ({"calibrate": "after"}, {"fit": "layer", "fit_steps": 5}):
        refused("found merge=narrow, fit=", recipe_on(words, 3, **more))
    refused("found merge=residual", Recipe())


def test_a_run_that_is_killed_while_it_measures(long_checkpoint: Path, words: Path, tmp_path: Path) -> None:
    """Moments count as complete once their run is through: the same command ends like the undisturbed run."""
    recipe = recipe_on(words, 4)
    folders = [tmp_path / name for name in ("undisturbed", "killed")]
    run(long_checkpoint, folders[0] / "out", recipe, moments=folders[0] / "moments")
    for what in ("layer 3: narrowed", "layer 12"):
        process = start(
            long_checkpoint, folders[1] / "out", recipe, moments=folders[1] / "moments", progress=Killing(what)
        )
        process.join()
        assert process.exitcode == -9
        assert not (folders[1] / "moments" / "complete").exists()
    run(long_checkpoint, folders[1] / "out", recipe, moments=folders[1] / "moments")
    undisturbed, killed = (folder.rglob("*") for folder in folders)
    assert [path.read_bytes() for path in sorted(killed) if path.suffix == ".safetensors"] == [
        path.read_bytes() for path in sorted(undisturbed) if path.suffix == ".safetensors"
    ]
    first, second = (Report.from_file(folder / "out" / "namex" / "report.json").layers for folder in folders)
    assert [layer["errors"] for layer in first] == [layer["errors"] for layer in second]


def test_moments_that_are_lost_are_measured_again(odd: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    source, moments = odd("qwen2_moe", torch.bfloat16, tokenizer=True), tmp_path / "moments"
    patch_checkpoint(source, tmp_path / "first", recipe_on(words, 4), moments=moments)
    kept = {name: data for name, (data, _) in all_files(moments).items()}
    layer = moe_layers(read_config(source))[-1]
    (moments / f"layer-{layer:05d}" / "record.json").write_text("{}")
    report = patch_checkpoint(source, tmp_path / "second", recipe_on(words, 3), moments=moments)
    assert all(layer["errors"] for layer in report.layers)
    assert {name: data for name, (data, _) in all_files(moments).items()} == kept


@pytest.mark.parametrize("lost", [True, False])
def test_a_damaged_file_of_moments_is_refused(
    odd: Callable[..., Path], words: Path, tmp_path: Path, lost: bool
) -> None:
    source, moments = odd("qwen2_moe", torch.bfloat16, tokenizer=True), tmp_path / "moments"
    patch_checkpoint(source, tmp_path / "first", recipe_on(words, 4), moments=moments)
    file = max(moments.rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink() if lost else file.write_bytes(data)
    for option in ("moments", "like"):
        with pytest.raises(CheckpointError, match=f"{file.name} is not as it was written"):
            patch_checkpoint(source, tmp_path / "out", recipe_on(words, 3), **{option: moments})
        assert not (tmp_path / "out").exists()


def test_moments_are_saved_or_taken_from_another(odd: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    source, folder = odd("qwen2_moe", torch.bfloat16, tokenizer=True), tmp_path / "moments"
    patch_checkpoint(source, tmp_path / "first", recipe_on(words, 4), moments=folder)
    with pytest.raises(UsageError, match="--like reads what --moments has saved"):
        patch_checkpoint(source, tmp_path / "out", recipe_on(words, 4), moments=folder, like=folder)


def test_without_text_no_room_is_kept_for_it(odd: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    source, folder, recipe = odd("qwen2_moe", torch.bfloat16, tokenizer=True), tmp_path / "moments", recipe_on(words, 4)
    patch_checkpoint(source, tmp_path / "first", recipe, moments=folder)
    plan, like = (make_plan(resolve(str(source)), recipe, "5GB", like=one) for one in (None, folder))
    assert plan.tokens == TOKENS
    assert space_needed(plan) - space_needed(like) == 2 * 4 * TOKENS * plan.shape.hidden
    assert peak_bytes(plan) - peak_bytes(like) > 4 * 4 * TOKENS * plan.shape.hidden


def test_a_model_is_cut_like_another(odd: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    """By the moments of a model of the same shape, without a tokenizer; downs are the model's own."""
    first = odd("qwen2_moe", torch.bfloat16, tokenizer=True, **WIDE)
    moments, folders = tmp_path / "moments", [tmp_path / name for name in ("same", "quiet")]
    recipe = recipe_on(words, 16)
    patch_checkpoint(first, tmp_path / "out", recipe, moments=moments)
    for folder, factor in zip(folders, (1, 0.5), strict=True):
        tensors = read_tensors(first)
        write_folder(
            folder,
            read_config(first),
            {n: t * factor if n.endswith("down_proj.weight") else t for n, t in tensors.items()},
        )
    same, quiet = (
        patch_checkpoint(folder, tmp_path / f"{folder.name}-out", recipe, like=moments) for folder in folders
    )
    expected, tensors = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "same-out")
    assert differing(expected, tensors) == []
    halved = read_tensors(tmp_path / "quiet-out")
    assert all(torch.equal(halved[n], t / 2 if n.endswith("down_proj.weight") else t) for n, t in expected.items())
    assert "calibration" not in same.run
    assert same.run["like"] == quiet.run["like"]
    assert patch_checkpoint(folders[0], tmp_path / "same-out", recipe, like=moments) == same


def test_what_cannot_be_cut_like_another(odd: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    source, out, moments = odd("qwen2_moe", torch.bfloat16, tokenizer=True), tmp_path / "out", tmp_path / "moments"
    patch_checkpoint(source, tmp_path / "first", recipe_on(words, 4), moments=moments)

    def refused(match: str, recipe: Recipe, of: Path = source, folder: Path = moments) -> None:
        with pytest.raises((CheckpointError, RecipeError), match=match):
            patch_checkpoint(of, out, recipe, like=folder)
        assert not out.exists()

    refused("--like stands for the text .*calibrate=after", recipe_on(words, 3, calibrate="after"))
    refused("has no moments of all layers", recipe_on(words, 3), folder=tmp_path / "first")
    wide = odd("qwen2_moe", torch.bfloat16, tokenizer=True, **WIDE)
    refused("is of a model with width 8; this one has 24", recipe_on(words, 3), of=wide)
