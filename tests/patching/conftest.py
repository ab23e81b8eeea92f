"""A checkpoint on which a run takes long enough to be met in the middle."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture
def long_checkpoint(odd: Callable[..., Path]) -> Path:
    """Thirteen layers, twelve of them mixtures, in five shards over which every layer is scattered."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 13}
    return odd("deepseek", torch.bfloat16, shards=5, tokenizer=True, **sizes)
