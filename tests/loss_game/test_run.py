"""Recipes with ``metric: calibrated``: run by the experiment's script, refused in one line by the package alone."""

import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from game import by_losses

from namex_hf import patch_checkpoint
from namex_hf.commands.compare import main as compare
from namex_hf.commands.patch import main as patch
from namex_hf.errors import RecipeError
from namex_hf.merging.members import GAMES
from tests.helpers.checkpoints import differing, experts_field, read_config, read_tensors, same_bits
from tests.helpers.runs import TOKENS, live, load, logits, recipe_on

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "loss_game" / "run.py"
FIELDS = {"fit": "router", "metric": "calibrated", "power": "loss"}
FLAGS = ("--merge", "grouped", "--experts", "3", "--fit", "router", "--metric", "calibrated")
REFUSED = (
    "recipe field 'metric' is 'calibrated', the game over losses, which is an experiment: in a checkout of the sources "
    "use 'python experiments/loss_game/run.py patch' (or compare) with the same arguments; accepted here: euclidean"
)


def run(command: str, source: Path, out: Path, *options: object) -> None:
    """The script in a process of its own and a folder of its own; it says nothing."""
    call = [sys.executable, SCRIPT, command, source, "--out", out, "--quiet", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, call)), capture_output=True, text=True, timeout=300, env=environment, cwd=out.parent
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        ("qwen2_moe", torch.bfloat16, {"fuse": True}),
        ("deepseek", torch.float32, {"fuse": True, "norm_topk_prob": True}),
    ],
)
def test_both_paths_agree(
    odd, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype, changes: dict
) -> None:
    """The same class, numbers and logits, bit for bit; and other tensors than those of the game over weights."""
    source, recipe = odd(family, dtype, tokenizer=True, **changes), recipe_on(words, **FIELDS)
    monkeypatch.setitem(GAMES, "calibrated", by_losses)
    if family == "qwen2_moe":
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe.to_yaml())
        run("patch", source, tmp_path / "out", "--recipe", file)
    else:
        patch_checkpoint(source, tmp_path / "out", recipe)
    stored, patched = load(tmp_path / "out"), live(source, recipe)
    assert type(stored) is type(patched)
    assert differing(stored.state_dict(), patched.state_dict()) == []
    assert same_bits(logits(stored), logits(patched))
    assert stored.config.namex == patched.config.namex == replace(recipe, calibration_data=words.name).to_stored()
    for field in (experts_field(read_config(source)), "num_experts_per_tok"):
        assert getattr(stored.config, field) == getattr(patched.config, field) == recipe.to_dict()["experts"]
    for other in ({"fit": "router"}, {**FIELDS, "power": "equal"}):
        patch_checkpoint(source, tmp_path / "other", recipe_on(words, **other), overwrite=True)
        assert differing(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "other"))


def test_refused_without_the_experiment(odd, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the commands, with status 2 and one line, and by both functions; nothing is written."""
    source, out = odd("qwen2_moe", torch.float32, tokenizer=True), tmp_path / "out"
    for command, name in ((patch, "namex-patch"), (compare, "namex-compare")):
        assert command([str(source), "--out", str(out), *FLAGS]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"{name}: error: ")
        assert said.endswith(REFUSED)
    recipe = recipe_on(words, **FIELDS)
    for refused in (lambda: patch_checkpoint(source, out, recipe), lambda: live(source, recipe)):
        with pytest.raises(RecipeError) as error:
            refused()
        assert str(error.value) == REFUSED
    assert not out.exists()


def test_compare(odd, words: Path, tmp_path: Path) -> None:
    """Cells run in processes of their own, which know the game too."""
    source = odd("qwen2_moe", torch.float32, tokenizer=True)
    text = ("--calibration-data", words, "--calibration-tokens", TOKENS, "--texts", words, "--problems", 0)
    run("compare", source, tmp_path / "out", *FLAGS, "--fit-steps", 5, "--tokens", 64, *text)
    assert (tmp_path / "out" / "comparison.json").is_file()


def test_another_first_argument_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(GAMES, "calibrated", by_losses)  # which the script does for good
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "score"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"{SCRIPT}: error: the first argument is patch or compare"]
