"""Small random models of both families, live, with ``routing: stable``."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from namex_hf.models.configuration_deepseek import DeepseekConfig
from namex_hf.models.convert import patch_classes

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # where the agreement with a router is measured

SHARED = {
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "initializer_range": 0.3,  # so that every part shows
    "max_position_embeddings": 64,
}
CONFIGS = {
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SHARED, num_hidden_layers=2, num_experts=8, shared_expert_intermediate_size=8
    ),
    "deepseek": lambda: DeepseekConfig(
        **SHARED, num_hidden_layers=3, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1
    ),
}


@pytest.fixture
def make_model():
    """``make_model("deepseek", {"merge": "soft", ...})``: random, the same at every call; no id has an assignment."""

    def make(family: str = "qwen2_moe", recipe: dict | None = None):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
        patch_classes(model, dict(recipe or {"merge": "residual", "method": "smoe", "routing": "stable"}))
        return model.eval()

    return make
