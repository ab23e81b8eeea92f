"""Patching on token ids: no tokenizer is needed, on either path, and the file is part of the run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from namex_hf import Recipe, patch_checkpoint, patch_model
from namex_hf.errors import CalibrationError, OutputError
from namex_hf.patching.text import text_for
from tests.helpers.checkpoints import aligned, all_files, differing, read_config, read_tensors, settled_files
from tests.helpers.killing import Killing, start
from tests.helpers.runs import TOKENS, load, recipe_on, refused
from tests.helpers.toy_models import FAMILIES, VOCAB


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """More than a run reads."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, VOCAB, (50, 40)))
    return tmp_path / "ids.npy"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_of_a_text_say_what_the_text_says(odd, words: Path, tmp_path: Path, family: str) -> None:
    """Tokens of every expert, and which ones are kept, of a checkpoint without a tokenizer."""
    recipe = recipe_on(words, operator="keep", calibrate="before")
    spoken, bare = odd(family, torch.float32, tokenizer=True), odd(family, torch.float32)
    wanted = patch_checkpoint(spoken, tmp_path / "text", recipe)
    text = text_for(recipe, read_config(spoken), AutoTokenizer.from_pretrained(spoken))
    np.save(tmp_path / "ids.npy", text.ids.numpy().astype("<u2"))
    found = patch_checkpoint(
        bare, tmp_path / "ids", recipe_on(tmp_path / "ids.npy", operator="keep", calibrate="before")
    )
    assert [(one["usage"], one["kept"]) for one in found.layers] == [
        (one["usage"], one["kept"]) for one in wanted.layers
    ]
    assert differing(read_tensors(tmp_path / "text"), read_tensors(tmp_path / "ids")) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_model_needs_no_tokenizer(odd, ids: Path, tmp_path: Path, family: str) -> None:
    source, recipe = odd(family, torch.float32), recipe_on(ids, fit="router")
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    model = patch_model(load(source), recipe)
    assert differing(aligned(load(tmp_path / "out")).state_dict(), model.state_dict()) == []
    told = text_for(recipe, read_config(source))
    assert report.run["calibration"] == {"name": "ids.npy", "sha256": told.sha256, "tokens": TOKENS}
    assert told.ids.shape == (TOKENS // 64, 64)
    assert model.config.namex == read_config(tmp_path / "out")["namex"]
    assert model.config.namex["calibration_data"] == "ids.npy"
    for name, (data, _) in all_files(tmp_path / "out").items():
        assert str(tmp_path).encode() not in data, name


def test_the_seed_draws_sequences(odd, ids: Path) -> None:
    source = odd("qwen2_moe", torch.bfloat16)
    hashes = {text_for(recipe_on(ids, fit="router", seed=seed), read_config(source)).sha256 for seed in (0, 0, 1)}
    assert len(hashes) == 2


def test_bad_ids_leave_no_folder(odd, ids: Path, tmp_path: Path) -> None:
    source, out = odd("qwen2_moe", torch.bfloat16), tmp_path / "out"
    more = recipe_on(ids, fit="router", calibration_tokens=2001)
    refused(source, out, more, CalibrationError, "ids.npy has 2000 tokens, and 2001 are asked for; accepted: up to")
    few = recipe_on(ids, fit="router", calibration_tokens=127)
    refused(source, out, few, CalibrationError, "ids.npy: 1 sequences, and no file or data set has two")
    np.save(ids, np.full(TOKENS, VOCAB))
    foreign = recipe_on(ids, fit="router")
    refused(source, out, foreign, CalibrationError, f"ids.npy has token id {VOCAB}; accepted: 0 to {VOCAB - 1}, below")
    with pytest.raises(CalibrationError, match=f"ids.npy has token id {VOCAB}"):
        patch_model(load(source), foreign)
    gone = recipe_on(tmp_path / "no.npy", fit="router")
    refused(source, out, gone, CalibrationError, r"no.npy: no such file or folder; accepted: .*token ids \(\.npy\)")
    on_hub = Recipe(merge="grouped", experts=3, fit="router", calibration_data="me/ids.npy")
    refused(source, out, on_hub, CalibrationError, "me/ids.npy: no such file or folder")
    config = {name: value for name, value in read_config(source).items() if name != "vocab_size"}
    with pytest.raises(CalibrationError, match=r"config.json: vocab_size is None; token ids need"):
        text_for(foreign, config)


def test_another_file_is_another_run(odd, ids: Path, tmp_path: Path) -> None:
    """Refused on the folder that was begun, and on the complete one; the same ids from another place go on."""
    source, recipe, out = odd("qwen2_moe", torch.bfloat16), recipe_on(ids, fit="router"), tmp_path / "out"
    patch_checkpoint(source, tmp_path / "undisturbed", recipe)
    (tmp_path / "other").mkdir()
    (tmp_path / "same").mkdir()
    np.save(tmp_path / "other" / "ids.npy", np.load(ids)[::-1])
    other, same = (replace(recipe, calibration_data=str(tmp_path / name / "ids.npy")) for name in ("other", "same"))
    process = start(source, out, recipe, progress=Killing("layer 2"))
    process.join()
    assert process.exitcode == -9
    ids.rename(tmp_path / "same" / "ids.npy")
    for _ in ("begun", "complete"):
        before = all_files(out)
        with pytest.raises(OutputError, match=r"belongs to a run with another calibration \(sha256\);"):
            patch_checkpoint(source, out, other)
        assert all_files(out) == before
        patch_checkpoint(source, out, same)
    assert settled_files(out) == settled_files(tmp_path / "undisturbed")
