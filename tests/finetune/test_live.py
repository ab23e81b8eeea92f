"""The SmolTalk script with ``--propagation live``."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from namex_hf import Recipe, load_patched
from namex_hf.training.bargain import rebargain

LIVE = {"propagation": "live", "save_steps": 1, "max_steps": 4}
"""Checkpoints also between two bargains, whose weights are then not those of the last one."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """At gamma 1 the first base gets no gradient from later layers."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text("gamma: 0.6\nmomentum: complex\n")
    return path


@pytest.fixture(scope="module")
def whole(run, recipe, tmp_path_factory):
    ended = run(tmp_path_factory.mktemp("live") / "out", recipe=str(recipe), **LIVE)
    assert ended.code == 0, ended.said
    return ended


def test_the_folder_is_a_patched_one_whose_bases_are_the_walk(whole, recipe):
    model = load_patched(whole.out)
    settled = rebargain(model, Recipe.from_yaml(recipe))
    assert max(layer.drift for layer in settled[1:]) < 1e-6
    assert whole.report["run"]["training"]["live"]
    assert [("bargain/drift" in entry) for entry in whole.losses][1::2] == [True, True]
    # The report counts what trains: of five bases the first.
    trained = whole.report["training"]
    assert trained["trainable"]["base"] * 5 == trained["parameters"]["base"]


def test_killed_and_continued(whole, start, run, recipe, tmp_path):
    """From a checkpoint between two bargains: losses and weights of an undisturbed run, bit for bit."""
    out = tmp_path / "out"
    process = start(out, die_after=3, recipe=str(recipe), **LIVE)
    process.join()
    assert process.exitcode == -9
    ended = run(out, recipe=str(recipe), **LIVE)
    assert ended.code == 0, ended.said
    assert "going on from checkpoint-3" in ended.said
    assert ended.losses == whole.losses
    assert (out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_it_is_another_training_than_that_of_stored_bases(whole, run, recipe, tmp_path):
    stored = run(tmp_path / "out", recipe=str(recipe), **{**LIVE, "propagation": "stored"})
    assert stored.losses[0]["loss"] == whole.losses[0]["loss"]
    assert stored.losses[-1]["loss"] != whole.losses[-1]["loss"]
    assert run(whole.out, recipe=str(recipe), **{**LIVE, "propagation": "stored"}).code == 2


def test_under_lora(run, recipe, tmp_path):
    ended = run(tmp_path / "out", "--use_peft", recipe=str(recipe), **{**LIVE, "max_steps": 2})
    assert ended.code == 0, ended.said
    settled = rebargain(load_patched(ended.out, dtype=torch.float32), Recipe.from_yaml(recipe))
    assert max(layer.drift for layer in settled[1:]) < 1e-5
    adapter = load_file(ended.out / "adapter" / "adapter_model.safetensors")
    assert sum("base_expert" in name for name in adapter) == 3 * 5


def test_where_no_base_walks_there_is_nothing_live(run, tmp_path):
    (tmp_path / "camex.yaml").write_text("method: camex")
    ended = run(tmp_path / "out", recipe=str(tmp_path / "camex.yaml"), **{**LIVE, "max_steps": 1})
    assert ended.code == 0, ended.said
    assert "no bargain in training: method camex" in ended.said


def test_an_unknown_form_is_refused(run, tmp_path):
    ended = run(tmp_path / "out", propagation="lively")
    assert ended.code == 2
    assert ended.said.strip().splitlines()[-1] == (
        "sft_smoltalk.py: error: --propagation lively: accepted: stored, live"
    )
