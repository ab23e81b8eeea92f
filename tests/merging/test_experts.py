"""The matrices of experts: all of a layer or one, with a gate or without, with biases or none."""

import numpy as np
import pytest
import torch
from torch.nn.functional import relu

from namex_hf.merging.alignment import permuted
from namex_hf.merging.experts import ExpertWeights
from namex_hf.merging.routing import expert_output
from tests.helpers.checkpoints import PROJECTIONS
from tests.helpers.mixtures import HIDDEN, WIDTH, draws, expert_at, random_experts, random_tokens
from tests.helpers.reference import double


def biased(gated: bool) -> ExpertWeights:
    gate, up, down = expert_at(random_experts(1, 0), 0).values()
    gate_bias, up_bias, down_bias = (torch.randn(size, generator=draws(size)) for size in (WIDTH, WIDTH, HIDDEN))
    return ExpertWeights(gate if gated else None, up, down, gate_bias if gated else None, up_bias, down_bias)


@pytest.mark.parametrize("gated", [True, False])
def test_biases_and_no_gate(gated: bool) -> None:
    """Against numpy; and the same function in another order of neurons."""
    expert, inputs = biased(gated), random_tokens(20, 0)
    assert [*expert] == [*PROJECTIONS[not gated :], *(f"{name}.bias" for name in PROJECTIONS[not gated :])]
    of = {name: double(tensor) for name, tensor in expert.items()}
    up, x = double(inputs) @ of["up_proj"].T + of["up_proj.bias"], double(inputs)
    inner = np.maximum(x @ of["gate_proj"].T + of["gate_proj.bias"], 0) * up if gated else np.maximum(up, 0)
    wanted = inner @ of["down_proj"].T + of["down_proj.bias"]
    other = permuted(expert, torch.tensor([3, 0, 4, 1, 2]))
    assert not torch.equal(other.up_bias, expert.up_bias)
    for one in (expert, other):
        np.testing.assert_allclose(expert_output(inputs, one, relu).numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("listed", [False, True])
def test_a_layer_is_read_in_place(listed: bool) -> None:
    """Whether its matrices are stacked or listed."""
    stacked = random_experts(3, 0, torch.bfloat16)
    layer = stacked.map(list) if listed else stacked
    assert (layer.count, layer.dtype) == (3, torch.bfloat16)
    layer.set_expert(2, layer.expert(0))
    layer.subset([1])["up_proj"][0].zero_()
    assert torch.equal(stacked.down[2], stacked.down[0])
    assert not stacked.up[1].any()
    copied = layer.stacked([2, 0])
    copied.gate.zero_()
    assert stacked.gate[2].any()
    assert {name: tuple(matrix.shape) for name, matrix in layer.zeros().items()} == {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }


def test_what_is_not_there() -> None:
    expert = biased(False)
    for name in ("gate_proj", "gate_proj.bias", "w1"):
        with pytest.raises(KeyError):
            expert[name]
