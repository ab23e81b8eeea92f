"""``target: model`` on the packaged models: a layer aims at what transformers' own model has above that layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, patch_checkpoint, patch_model
from namex_hf.calibration.text import CalibrationText
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import RecipeError
from namex_hf.merging.moe_layer import MoELayer, Text
from namex_hf.patching.text import text_for
from namex_hf.patching.text_pass import TextPass
from tests.helpers.toy_models import odd_checkpoint

MODELS = ("tiny", "tiny-deepseek")


def recipe(**fields: Any) -> Recipe:
    """Half the experts, eight sequences, downs in closed form alone."""
    values = {
        "merge": "grouped",
        "experts": 8,
        "down": "refit",
        "target": "model",
        "calibration_tokens": 4096,
        **fields,
    }
    return Recipe(method="ep-camex", **values)


def original(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve(name).folder, dtype=torch.float32)


def patched(name: str, how: Recipe) -> tuple[Any, CalibrationText]:
    """The model, and the text that it heard."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(name).folder)
    model = original(name)
    text = text_for(how, model.config.to_dict(), tokenizer)
    return patch_model(model, how, tokenizer=tokenizer), text


@torch.no_grad()
def states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states above every layer, before the last norm."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, given, output: seen.append(output)) for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def missed(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_wanted_of_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's hidden states, but for what the layer has without routed experts, on the patched model's text.

    So layers make up for those below them: the top is nearer to the original's than where every layer aims at what it
    would have said itself. In the lowest both are one.
    """
    heard: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    tap, activations, layers = TextPass.tap, TextPass.activations, []

    def noted(self: TextPass, layer: int) -> None:
        layers.append(layer)
        tap(self, layer)

    def spy(self: TextPass, mixture: MoELayer) -> Text:
        text = activations(self, mixture)
        assert text.target is not None
        heard[layers[-1]] = self.hidden.clone(), text.target.view_as(self.hidden).clone()
        return text

    with monkeypatch.context() as patch:
        patch.setattr(TextPass, "tap", noted)
        patch.setattr(TextPass, "activations", spy)
        model, text = patched(name, recipe())
    assert text.ids.shape == (8, 512)
    wanted, found = states(original(name), text.ids), states(model, text.ids)
    assert list(heard) == ([0, 1, 2, 3, 4] if name == "tiny" else [1, 2, 3, 4])
    for layer, (rest, aim) in heard.items():
        torch.testing.assert_close(rest + aim, wanted[layer], rtol=1e-3, atol=1e-3)
        assert 1e-3 < missed(found[layer], wanted[layer]) < missed(rest, wanted[layer])

    own = states(patched(name, recipe(target="layer"))[0], text.ids)
    assert missed(own[min(heard)], found[min(heard)]) < 1e-4
    assert missed(found[-1], wanted[-1]) < 0.95 * missed(own[-1], wanted[-1])


def test_slices_that_are_none(words: Path, tmp_path: Path) -> None:
    """The control that begins at the shared expert needs a width that the routed one divides; others do not."""
    sizes = {"shared_expert_intermediate_size": 20}
    source = odd_checkpoint(tmp_path / "model", "qwen2_moe", torch.bfloat16, tokenizer=True, **sizes)
    how = {"experts": 3, "fit": "router", "fit_steps": 2, "calibration_data": str(words), "calibration_tokens": 1024}
    with pytest.raises(RecipeError, match="'operator' is 'shared'; the shared expert's width 20 is no multiple of the"):
        patch_checkpoint(source, tmp_path / "out", Recipe(merge="grouped", operator="shared", **how))
    assert not (tmp_path / "out").exists()
    patch_checkpoint(source, tmp_path / "out", Recipe(merge="grouped", operator="random", **how))
