"""Experts that know nothing of the routed ones: their size and shape, and nothing else of them."""

import pytest
import torch

from namex_hf.merging.controls import random_experts, shared_experts
from namex_hf.merging.experts import ExpertWeights
from tests.helpers.checkpoints import PROJECTIONS
from tests.helpers.mixtures import HIDDEN, WIDTH, draws, random_tokens, weights_of
from tests.helpers.mixtures import random_experts as experts_of
from tests.helpers.reference import answers64, double, neurons64

SLICES = 3


def scaled(dtype: torch.dtype = torch.float32) -> ExpertWeights:
    """Experts whose projections, and which themselves, differ in size."""
    of, size = experts_of(4, 0), {"gate_proj": 0.1, "up_proj": 1.0, "down_proj": 7.0}
    own = torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None, None]
    return weights_of({name: (size[name] * own * of[name]).to(dtype) for name in PROJECTIONS})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_experts_have_the_size_of_the_layer(dtype: torch.dtype) -> None:
    """Each projection its own mean square; normal, none like another."""
    layer = scaled(dtype)
    made = random_experts(layer, 2000, 0)
    for name in PROJECTIONS:
        values, wanted = double(made[name]), (double(layer[name]) ** 2).mean()
        assert made[name].dtype == dtype
        assert values.shape == (2000, *layer[name].shape[1:])
        assert (values**2).mean() == pytest.approx(wanted, rel=0.03)
        assert abs(values.mean()) < 0.02 * wanted**0.5
        assert (values**4).mean() == pytest.approx(3 * wanted**2, rel=0.1)
        assert len(set(values[:, 0, 0])) > 500
    flat = double(torch.cat([made[name].flatten(1) for name in ("gate_proj", "up_proj")], dim=1).float())
    assert abs((flat[:, :30] * flat[:, 30:]).mean()) < 0.05 * flat[:, :30].std() * flat[:, 30:].std()


def test_random_experts_repeat() -> None:
    """With the seed alone, and drawing no number of others."""
    state = torch.get_rng_state()
    one, again, other = (random_experts(scaled(), 3, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    for name in PROJECTIONS:
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])


def test_random_experts_of_matrices_that_are_not_stacked() -> None:
    layer = scaled()
    one, other = random_experts(layer, 3, 0), random_experts(layer.map(list), 3, 0)
    assert all(torch.equal(one[name], other[name]) for name in PROJECTIONS)


def shared() -> dict[str, torch.Tensor]:
    draw, wide = draws(9), SLICES * WIDTH
    shapes = {"gate_proj": (wide, HIDDEN), "up_proj": (wide, HIDDEN), "down_proj": (HIDDEN, wide)}
    return {name: torch.randn(shapes[name], generator=draw) for name in PROJECTIONS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, SLICES, 7])
def test_slices_of_the_shared_expert_in_turn(count: int, dtype: torch.dtype) -> None:
    """Neuron by neuron: rows of gate and up, columns of down."""
    made, whole = shared_experts(shared(), scaled(dtype), count), shared()
    for number in range(count):
        part = slice(number % SLICES * WIDTH, (number % SLICES + 1) * WIDTH)
        assert torch.equal(made["gate_proj"][number], whole["gate_proj"][part].to(dtype))
        assert torch.equal(made["up_proj"][number], whole["up_proj"][part].to(dtype))
        assert torch.equal(made["down_proj"][number], whole["down_proj"][:, part].to(dtype))
    assert all(len(made[name]) == count for name in PROJECTIONS)


def test_all_slices_together_are_the_shared_expert() -> None:
    inputs, whole = random_tokens(20, 0), shared()
    answered = answers64(inputs, shared_experts(whole, scaled(), SLICES)).sum(1)
    wanted = neurons64(inputs, whole) @ double(whole["down_proj"]).T
    assert abs(answered - wanted).max() < 1e-5 * abs(wanted).max()


def test_the_shared_expert_is_left_alone() -> None:
    """What is fitted later is memory of its own, also where there is but one slice."""
    whole = {name: matrix[:WIDTH] if name != "down_proj" else matrix[:, :WIDTH] for name, matrix in shared().items()}
    before = {name: matrix.clone() for name, matrix in whole.items()}
    made = shared_experts(whole, scaled(), 2)
    for name in PROJECTIONS:
        made[name].zero_()
        assert torch.equal(whole[name], before[name])
