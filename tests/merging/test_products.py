"""Products of experts and text in bfloat16, where the hardware has them."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from namex_hf.merging import routing
from namex_hf.merging.gate import Gate
from namex_hf.merging.moe_layer import MoELayer
from namex_hf.merging.routing import expert_output, multiplies_bfloat16, neurons, on_tokens
from tests.helpers.mixtures import HIDDEN, draws, random_experts, random_tokens
from tests.helpers.reference import double, output64

EXPERTS, TOKENS = 6, 80


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the hardware has none: they are slow there."""
    monkeypatch.setattr(routing, "multiplies_bfloat16", lambda kind: True)


def layer(dtype: torch.dtype) -> MoELayer:
    router = torch.randn(EXPERTS, HIDDEN, generator=draws(1)).to(dtype)
    return MoELayer(random_experts(EXPERTS, 0, dtype), router, Gate(2, False), silu)


@pytest.mark.parametrize("function", [neurons, expert_output])
def test_bfloat16_experts_are_multiplied_as_a_model_in_bfloat16_does(bfloat16_products: None, function) -> None:
    expert, inputs = layer(torch.bfloat16).experts.expert(3), random_tokens(TOKENS, 0)
    found = on_tokens(function, inputs, expert, silu)
    assert found.dtype == torch.float32
    assert torch.equal(found, function(inputs.bfloat16(), expert, silu).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_others_are_multiplied_in_float32(bfloat16_products: None, dtype: torch.dtype) -> None:
    expert, inputs = layer(dtype).experts.expert(3), random_tokens(TOKENS, 0)
    assert torch.equal(on_tokens(expert_output, inputs, expert, silu), expert_output(inputs, expert.to(inputs), silu))


def test_outputs_are_summed_in_float32(bfloat16_products: None) -> None:
    """The sum over experts rounds nothing more: it is as far from exact as the products are."""
    of, inputs = layer(torch.bfloat16), random_tokens(TOKENS, 0)
    chosen = of.route(inputs)
    output = of.output(inputs, chosen)
    each = torch.zeros_like(inputs, dtype=torch.float64)
    for number in range(EXPERTS):
        token, gate = chosen.of(number)
        own = on_tokens(expert_output, inputs[token], of.experts.expert(number), silu)
        each.index_add_(0, token, (gate[:, None] * own).double())
    np.testing.assert_allclose(output.numpy(), each.numpy(), rtol=1e-5, atol=1e-5)
    exact = output64(inputs, chosen, dict(of.experts))
    apart = np.linalg.norm(double(output) - exact) / np.linalg.norm(exact)
    assert 1e-5 < apart < 1e-2


def test_no_other_device_is_asked_for_bfloat16() -> None:
    assert not multiplies_bfloat16("mps")
    assert isinstance(multiplies_bfloat16("cpu"), bool)
