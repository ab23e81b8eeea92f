"""One step of the live walk: against finite differences, and what autograd keeps of it."""

import pytest
import torch

from namex_hf.merging.experts import PROJECTIONS, ExpertWeights
from namex_hf.recipe import Recipe
from namex_hf.training.live_step import WeightedStep, step_on

SHAPES = {"gate_proj": (3, 4), "up_proj": (3, 4), "down_proj": (4, 3)}
COUNT, LAYERS = 5, 3


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("granularity", ["matrix", "expert"])
@pytest.mark.parametrize("beta", [None, "0.9", "0.854,0.359"], ids=["none", "real", "complex"])
def test_gradients_of_a_walk_are_finite_differences(beta, granularity):
    """Through three layers, so that momentum acts; gamma is not 1, where the first base would get nothing."""
    torch.manual_seed(0)
    momentum = "complex" if beta else "none"
    choice = Recipe(gamma=0.7, momentum=momentum, beta=beta, granularity=granularity).merge
    games = 1 if granularity == "expert" else 3
    weights = [torch.rand(games, COUNT, dtype=torch.float64) for _ in range(LAYERS)]
    first = [drawn(*SHAPES[name]) for name in PROJECTIONS]
    experts = [drawn(COUNT, *SHAPES[name]) for _ in range(LAYERS) for name in PROJECTIONS]

    def walk(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        base, momentum = dict(zip(PROJECTIONS, leaves[:3], strict=True)), {}
        for layer in range(LAYERS):
            own = ExpertWeights(*leaves[3 + 3 * layer :][:3])
            base, momentum = step_on(own, base, momentum, weights[layer], choice)
        return tuple(base.values())

    assert torch.autograd.gradcheck(walk, (*first, *experts), fast_mode=True)


def test_the_backward_pass_keeps_no_expert():
    """Of the step autograd holds what it is made of by nobody else: nothing at all, the weights are plain numbers."""
    kept: list[torch.Tensor] = []
    experts, base = drawn(COUNT, 8, 8), drawn(8, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        WeightedStep.apply(experts, base, torch.full((COUNT,), 0.2, dtype=torch.float64)).sum()
    assert not kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_experts_are_summed_in_the_base_s_dtype_and_get_gradients_in_their_own(dtype):
    torch.manual_seed(0)
    experts, base = drawn(COUNT, 6, 7, dtype=dtype), drawn(6, 7, dtype=torch.float32)
    weights = torch.rand(COUNT, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = WeightedStep.apply(experts, base, weights)
    wanted = (weights[:, None, None] * (experts.double() - base.double())).sum(0)
    torch.testing.assert_close(step.double(), wanted, rtol=1e-6, atol=1e-6)
    (step * torch.arange(42.0).view(6, 7)).sum().backward()
    along = weights[:, None, None].float() * torch.arange(42.0).view(6, 7)
    assert experts.grad.dtype == dtype
    torch.testing.assert_close(experts.grad, along.to(dtype))
    torch.testing.assert_close(base.grad, -along.sum(0))


def test_only_what_needs_a_gradient_gets_one():
    experts, base = drawn(COUNT, 3, 3), drawn(3, 3)
    weights = torch.rand(COUNT, dtype=torch.float64)
    WeightedStep.apply(experts.detach(), base, weights).sum().backward()
    WeightedStep.apply(experts, base.detach(), weights).sum().backward()
    torch.testing.assert_close(base.grad, -weights.sum() * torch.ones(3, 3, dtype=torch.float64))
    torch.testing.assert_close(experts.grad, weights[:, None, None].expand(COUNT, 3, 3))
