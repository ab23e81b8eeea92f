"""``neurons: gradient``: those stay on which the loss depends most, by finite differences of the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from namex_hf import Recipe, patch_checkpoint, patch_model
from namex_hf.calibration.text import CalibrationText
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import RecipeError
from namex_hf.evaluation.loading import tokenizer_of
from namex_hf.families.outline import outline_of
from namex_hf.patching import plan as planning
from namex_hf.patching.gradients import neuron_gradients
from namex_hf.patching.plan import make_plan
from namex_hf.patching.text import text_for
from tests.helpers.checkpoints import read_tensors
from tests.helpers.recipes import WIDE


def recipe_on(words: Path, **fields: object) -> Recipe:
    text = {"calibration_data": str(words), "calibration_tokens": 512}
    return Recipe(merge="narrow", width=16, neurons="gradient", **{**text, **fields})


def text_and_model(source: Path, recipe: Recipe) -> tuple[CalibrationText, Any]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return text_for(recipe, model.config.to_dict(), tokenizer_of(source)), model


def loss_of(model: Any, ids: torch.Tensor) -> float:
    """In the model's own dtype; transformers computes it in float32."""
    return float(cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:]))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_scores_are_changes_of_the_loss(odd, words: Path, family: str) -> None:
    """To first order: the change of each sequence's loss as a neuron's down column shrinks a little."""
    source = odd(family, torch.float32, tokenizer=True, **WIDE)
    text, model = text_and_model(source, recipe_on(words))
    outline = outline_of(model.config.to_dict())
    layer = outline.shape.layers[-1]
    scores = neuron_gradients(model, outline, text, "cpu")
    assert {name: tuple(score.shape) for name, score in scores.items()} == dict.fromkeys(outline.shape.layers, (7, 24))
    model = model.double()
    model.set_experts_implementation("eager")
    down = model.get_submodule(outline.blocks[layer]).experts.down_proj
    losses = []
    for expert, neuron in ((0, 3), (2, 20)):
        changes = []
        for factor in (1 + 1e-2, 1 - 1e-2):
            with torch.no_grad():
                before = down[expert, :, neuron].clone()
                down[expert, :, neuron] *= factor
                changes.append([loss_of(model, ids) for ids in text.ids])
                down[expert, :, neuron] = before
        slopes = (np.array(changes[0]) - np.array(changes[1])) / 2e-2
        losses.append((slopes**2).sum())
    found = [float(scores[layer][expert, neuron]) for expert, neuron in ((0, 3), (2, 20))]
    np.testing.assert_allclose(found, losses, rtol=1e-3)


def test_a_balance_loss_has_no_part_in_the_scores(odd, words: Path) -> None:
    text, model = text_and_model(odd("qwen2_moe", torch.float32, tokenizer=True, **WIDE), recipe_on(words))
    outline = outline_of(model.config.to_dict())
    scores = neuron_gradients(model, outline, text, "cpu")
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 10.0
    again = neuron_gradients(model, outline, text, "cpu")
    assert all(torch.equal(again[layer], one) for layer, one in scores.items())


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_neurons_of_the_largest_scores_stay(odd, words: Path, tmp_path: Path, family: str) -> None:
    """On disk as in memory; an expert with few tokens keeps those of the largest weights."""
    source, recipe = odd(family, torch.bfloat16, tokenizer=True, **WIDE), recipe_on(words)
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    text, model = text_and_model(source, recipe)
    scores = neuron_gradients(model, outline_of(model.config.to_dict()), text, "cpu")
    statistics = load_file(tmp_path / "out" / "namex" / "statistics.safetensors")
    seen = 0
    for record in report.layers:
        layer = record["layer"]
        for expert, kept in enumerate(statistics[f"layers.{layer}.neurons"]):
            if record["usage"][expert] >= 16:
                seen += 1
                assert kept.tolist() == sorted(scores[layer][expert].topk(16).indices.tolist())
    assert seen > 5
    live = AutoModelForCausalLM.from_pretrained(source)
    before = [parameter.requires_grad for parameter in live.parameters()]
    patch_model(live, recipe, tokenizer_of(source))
    assert [parameter.requires_grad for parameter in live.parameters()] == before
    live.save_pretrained(tmp_path / "live")
    expected = read_tensors(tmp_path / "out")
    saved = read_tensors(tmp_path / "live")
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_where_gradients_are_refused(odd, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = odd("qwen2_moe", torch.bfloat16, tokenizer=True, **WIDE)
    with pytest.raises(RecipeError, match="it needs merge 'narrow'; found merge=grouped, neurons=gradient"):
        Recipe(merge="grouped", experts=4, width=16, neurons="gradient")
    for option in ("moments", "like"):
        with pytest.raises(RecipeError, match=f"--{option} stands for the text"):
            patch_checkpoint(source, tmp_path / "out", recipe_on(words), **{option: tmp_path / "moments"})
    monkeypatch.setattr(planning, "SMALL_BYTES", 1000)
    with pytest.raises(RecipeError, match="accepted for models up to 1"):
        make_plan(resolve(source), recipe_on(words), "5GB")
