"""The floor: a model whose routed experts add nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from namex_hf.evaluation.loading import load, without_routed_experts


@torch.no_grad()
def test_it_is_the_model_with_routed_outputs_of_zero(folder: Path, model: Any):
    ids = torch.arange(40)[None]
    before = model(ids).logits
    hooks = [
        layer.mlp.experts.register_forward_hook(lambda _, given, output: torch.zeros_like(output))
        for layer in model.model.layers
    ]
    wanted = model(ids).logits
    for hook in hooks:
        hook.remove()
    found = without_routed_experts(load(folder))(ids).logits
    assert torch.equal(found, wanted)
    assert (found - before).abs().max() > 1e-2


def test_a_model_without_experts_has_no_floor():
    with pytest.raises(ValueError, match=r"Linear has no experts.down_proj"):
        without_routed_experts(torch.nn.Linear(2, 2))
