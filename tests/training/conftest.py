"""Small random models of both families, live, with ``routing: stable``."""

import sys
from pathlib import Path

import pytest
import torch

from namex_hf.models.convert import patch_classes
from tests.helpers.toy_models import toy_model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # where the agreement with a router is measured

SIZES = {"vocab_size": 41, "pad_token_id": None, "max_position_embeddings": 64, "tie_word_embeddings": False}
OWN = {
    "qwen2_moe": {"num_hidden_layers": 2, "shared_expert_intermediate_size": 8},
    "deepseek": {"n_shared_experts": 1},
}


@pytest.fixture
def make_model():
    """``make_model("deepseek", {"merge": "soft", ...})``: random, the same at every call; no id has an assignment."""

    def make(family: str = "qwen2_moe", recipe: dict | None = None):
        torch.manual_seed(0)  # for what is drawn of the model later
        model = toy_model(family, **{**SIZES, **OWN[family]})
        patch_classes(model, dict(recipe or {"merge": "residual", "method": "smoe", "routing": "stable"}))
        return model

    return make
