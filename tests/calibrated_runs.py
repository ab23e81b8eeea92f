"""Patching on a short text, of a folder and of a live model, and how the results are opened."""

from pathlib import Path
from typing import Any

import torch
from odd_checkpoints import aligned
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, patch_model

TOKENS = 1024


def recipe_on(words: Path, **fields: Any) -> Recipe:
    """Three experts, a short text and a short fit, unless said otherwise."""
    values: dict[str, Any] = {"merge": "grouped", "experts": 3, "calibration_tokens": TOKENS, **fields}
    if values.get("fit", "none") != "none":
        values = {"fit_steps": 30, **values}
    return Recipe(calibration_data=str(words), **values)


def load(folder: Path) -> Any:
    """As a user does, with nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return aligned(model.eval())


def live(source: Path, recipe: Recipe) -> Any:
    return patch_model(load(source), recipe, calibration=AutoTokenizer.from_pretrained(source))


PROBE = torch.randint(3, 53, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(PROBE).logits
