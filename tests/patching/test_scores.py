"""``scores=``: experts are weighed by what another run measured on the same source and text."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from namex_hf import Recipe, patch_checkpoint
from namex_hf.errors import CheckpointError, RecipeError
from tests.helpers.checkpoints import settled_files

KEPT = {"operator": "keep", "grouping": "none", "weighting": "saliency"}


def recipe_on(words: Path, experts: int, **fields: Any) -> Recipe:
    text = {"calibration_data": str(words), "calibration_tokens": 512, "calibrate": "before"}
    return Recipe(merge="grouped", experts=experts, **{**text, **fields})


def without_report(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in settled_files(folder).items() if "report" not in name}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
@pytest.mark.parametrize("fields", [KEPT, {"weighting": "usage"}, {"power": "usage"}], ids=str)
def test_several_results_from_one_pass_over_the_text(
    odd: Callable[..., Path], words: Path, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    """Weights and statistics are those of a pass of its own, though no expert saw a token; errors are not measured."""
    source = odd(family, torch.bfloat16, tokenizer=True)
    first = patch_checkpoint(source, tmp_path / "first", recipe_on(words, 4, **fields))
    own = patch_checkpoint(source, tmp_path / "own", recipe_on(words, 3, **fields))
    for layer in first.layers:
        assert len(layer["mass"]) == len(layer["usage"])
        assert layer["errors"]
    again = patch_checkpoint(source, tmp_path / "again", recipe_on(words, 3, **fields), scores=tmp_path / "first")
    assert without_report(tmp_path / "again") == without_report(tmp_path / "own")
    assert [layer["groups"] for layer in again.layers] == [layer["groups"] for layer in own.layers]
    assert [layer["mass"] for layer in again.layers] == [layer["mass"] for layer in own.layers]
    assert all(layer["errors"] == [] for layer in again.layers)
    later = patch_checkpoint(source, tmp_path / "later", recipe_on(words, 2, **fields), scores=tmp_path / "again")
    assert [layer["usage"] for layer in later.layers] == [layer["usage"] for layer in first.layers]


def test_scores_of_something_else_are_refused(odd: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    source, out, scored = odd("deepseek", torch.bfloat16, tokenizer=True), tmp_path / "out", tmp_path / "scored"
    patch_checkpoint(source, scored, recipe_on(words, 4, weighting="usage"))
    patch_checkpoint(source, tmp_path / "after", recipe_on(words, 4, calibrate="after", **KEPT))
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "generation_config.json").write_text('{"top_k": 3}')

    def refused(match: str, recipe: Recipe, of: Path = source, scores: Path = scored) -> None:
        with pytest.raises((CheckpointError, RecipeError), match=match):
            patch_checkpoint(of, out, recipe, scores=scores)
        assert not out.exists()

    refused("has no saliency of every layer", recipe_on(words, 3, **KEPT))
    refused(r"was made with another calibration \(sha256\)$", recipe_on(words, 3, weighting="usage", seed=1))
    refused("was made with another source", recipe_on(words, 3, weighting="usage"), of=other)
    refused("has scores of calibrate 'after'", recipe_on(words, 3, **KEPT), scores=tmp_path / "after")
    refused("has no namex/report.json", recipe_on(words, 3, **KEPT), scores=tmp_path)
    for more in ({"calibrate": "after"}, {"fit": "router", "fit_steps": 5}, {"down": "refit"}, {"align": "weights"}):
        refused("found merge=grouped, calibrate=", recipe_on(words, 3, **{"weighting": "usage", **more}))
    refused("found merge=residual", Recipe())
