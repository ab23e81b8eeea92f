"""Patching on a short text, of a folder and of a live model, and how the results are opened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, patch_checkpoint, patch_model
from tests.helpers.checkpoints import aligned

TOKENS = 1024


def recipe_on(words: Path, **fields: Any) -> Recipe:
    """Three experts, a short text and a short fit, unless said otherwise."""
    values: dict[str, Any] = {"merge": "grouped", "experts": 3, "calibration_tokens": TOKENS, **fields}
    if values.get("fit", "none") != "none":
        values = {"fit_steps": 10, **values}
    return Recipe(calibration_data=str(words), **values)


def load(folder: Path) -> Any:
    """As a user does, with nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return aligned(model.eval())


def live(source: Path, recipe: Recipe) -> Any:
    return patch_model(load(source), recipe, tokenizer=AutoTokenizer.from_pretrained(source))


PROBE = torch.randint(3, 53, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(PROBE).logits


@torch.no_grad()
def block_output(model: Any, layer: int, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routed output of a layer ``[sequences, length, hidden]``, the experts chosen and their gate values."""
    block, seen = model.model.layers[layer].mlp, []
    handle = block.experts.register_forward_hook(lambda module, given, output: seen.append((*given[1:], output)))
    block(inputs)
    handle.remove()
    index, value, output = seen[0]
    return output.view(inputs.shape), index, value


@torch.no_grad()
def block_inputs(model: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.model.layers[layer].mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(ids)
    handle.remove()
    return seen[0]


def refused(source: Path, out: Path, recipe: Recipe, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        patch_checkpoint(source, out, recipe)
    assert not out.exists()
