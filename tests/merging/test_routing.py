"""Routing as transformers has it, and the sums over a routing."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeTopKRouter

from namex_hf.merging.experts import ExpertWeights
from namex_hf.merging.gate import Gate
from namex_hf.merging.routing import TokenRouting, gate_values, route, routed_output
from tests.helpers.mixtures import HIDDEN, WIDTH, draws, random_experts, random_routing
from tests.helpers.mixtures import random_tokens as tokens
from tests.helpers.reference import gates64, output64

EXPERTS, TOP_K, TOKENS = 7, 3, 50


@pytest.mark.parametrize("renormalises", [False, True])
def test_as_transformers(renormalises: bool) -> None:
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=renormalises,
    )
    config._experts_implementation = "eager"
    router, block = Qwen2MoeTopKRouter(config), Qwen2MoeExperts(config)
    experts, inputs = random_experts(EXPERTS, 0), tokens(TOKENS, 0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=draws(1)))
        block.gate_up_proj.copy_(torch.cat([experts["gate_proj"], experts["up_proj"]], dim=1))
        block.down_proj.copy_(experts["down_proj"])
        _, value, index = router(inputs)
        wanted = block(inputs, index, value)
    found = route(inputs, router.weight.detach(), Gate(TOP_K, renormalises))
    assert torch.equal(found.index, index)
    torch.testing.assert_close(found.value, value)
    output = routed_output(inputs, found, experts, silu)
    torch.testing.assert_close(output, wanted)
    dense = gate_values(inputs, router.weight.detach(), Gate(TOP_K, renormalises))
    np.testing.assert_allclose(dense.numpy(), gates64(found, EXPERTS), rtol=1e-6)


def test_router_in_lower_precision() -> None:
    """Its rows are read as they are, the softmax is float32."""
    inputs, rows = tokens(TOKENS, 0), torch.randn(EXPERTS, HIDDEN, generator=draws(1)).bfloat16()
    found, wanted = route(inputs, rows, Gate(TOP_K, False)), route(inputs, rows.float(), Gate(TOP_K, False))
    assert found.value.dtype == torch.float32
    assert torch.equal(found.value, wanted.value)


def test_sums() -> None:
    """Counts and gate values of every expert, one without tokens and the last one included."""
    routing = random_routing(TOKENS, EXPERTS - 2, TOP_K, 0)
    gates = gates64(routing, EXPERTS)
    assert routing.count(EXPERTS).tolist() == (gates > 0).sum(0).tolist()
    np.testing.assert_allclose(routing.mass(EXPERTS).numpy(), gates.sum(0), rtol=1e-12)
    for expert in range(EXPERTS):
        token, value = routing.of(expert)
        assert token.tolist() == gates[:, expert].nonzero()[0].tolist()
        np.testing.assert_array_equal(value.double().numpy(), gates[token.numpy(), expert])


def test_experts_are_asked_for_once_and_only_with_tokens() -> None:
    experts, inputs = random_experts(EXPERTS, 0), tokens(TOKENS, 0)
    full = random_routing(TOKENS, EXPERTS, TOP_K, 0)
    routing = TokenRouting(torch.where(full.index == 4, 0, full.index), full.value)  # a token may hear one expert twice
    asked: list[int] = []

    class Recorded(ExpertWeights):
        def expert(self, number: int) -> ExpertWeights:
            asked.append(number)
            return super().expert(number)

    output = routed_output(inputs, routing, Recorded(*experts.values()), silu)
    assert asked == [0, 1, 2, 3, 5, 6]
    twice = output64(inputs, full, {name: matrix[[0, 1, 2, 3, 0, 5, 6]] for name, matrix in experts.items()})
    np.testing.assert_allclose(output.numpy(), twice, rtol=1e-4, atol=1e-4)
