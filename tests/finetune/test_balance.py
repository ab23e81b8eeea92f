"""The load of experts, and the bias that balances it without a loss."""

import math

import pytest
import torch
from expert_load import LoadHook, imbalance
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter


def router(renormalises: bool = False) -> Qwen2MoeTopKRouter:
    """Two of four experts; its logits are what it is given."""
    made = Qwen2MoeTopKRouter(
        Qwen2MoeConfig(num_experts=4, num_experts_per_tok=2, hidden_size=4, norm_topk_prob=renormalises)
    )
    made.weight.data = torch.eye(4)
    return made


TOKEN = torch.tensor([[math.log(4), math.log(3), math.log(2), math.log(1)]])  # softmax: 0.4, 0.3, 0.2, 0.1


@pytest.mark.parametrize(("renormalises", "first", "then"), [(False, [0.4, 0.3], [0.2, 0.1]), (True, [4, 3], [2, 1])])
def test_a_bias_chooses_and_the_softmax_weighs(renormalises, first, then):
    gate = router(renormalises)
    hook = LoadHook(gate, rate=0.2)
    first, then = ([value / sum(row) for value in row] if renormalises else row for row in (first, then))
    logits, value, index = gate(TOKEN)
    assert index.tolist() == [[0, 1]]
    assert value[0].tolist() == pytest.approx(first)
    assert hook.step() == pytest.approx(1.0)  # one slot each for two of four experts: twice an equal share
    assert hook.bias.tolist() == pytest.approx([-0.2, -0.2, 0.2, 0.2])
    again, value, index = gate(TOKEN)  # 0.2, 0.1, 0.4, 0.3 decide
    assert index.tolist() == [[2, 3]]
    assert value[0].tolist() == pytest.approx(then)
    assert torch.equal(again, logits)
    hook.step()
    assert hook.bias.tolist() == pytest.approx([0, 0, 0, 0])


def test_the_bias_has_no_gradient_and_stays_in_evaluation():
    gate = router()
    hook = LoadHook(gate, rate=0.2)
    gate(TOKEN)
    hook.step()
    inputs = TOKEN.clone().requires_grad_()
    gate.eval()
    gate(inputs)[1][0, 0].backward()  # s_2 = 0.2: its gradient is s_2 (1[j = 2] - s_j)
    assert inputs.grad[0].tolist() == pytest.approx([-0.08, -0.06, 0.16, -0.02])
    assert hook.counts.tolist() == [0, 0, 0, 0]
    assert not list(gate.buffers())  # nothing of it is saved


def test_without_a_rate_the_router_is_as_it_was():
    gate = router()
    before = gate(TOKEN)
    hook = LoadHook(gate)
    after = gate(TOKEN)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert hook.step() == pytest.approx(1.0)
    assert hook.bias.tolist() == [0, 0, 0, 0]


def test_imbalance():
    assert imbalance(torch.tensor([5, 5, 5, 5])) == 0
    assert imbalance(torch.tensor([20, 0, 0, 0])) == 3
