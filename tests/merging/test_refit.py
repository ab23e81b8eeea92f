"""Refitted downs against numpy's least squares: one of them, and all of a layer together."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from namex_hf.merging.gate import Gate
from namex_hf.merging.moe_layer import MoELayer
from namex_hf.merging.refit import refit_downs, refitted_down
from namex_hf.merging.routing import TokenRouting
from tests.helpers.mixtures import HIDDEN, WIDTH, draws, expert_at, random_experts, random_routing, random_tokens
from tests.helpers.reference import double, gates64, neurons64, output64

EXPERTS, TOP_K, TOKENS = 4, 2, 60
quick = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


@quick
@given(seeds, st.integers(1, 12), st.sampled_from([1e-4, 1e-1, 10.0]))
def test_one_down(seed: int, tokens: int, ridge: float) -> None:
    """Rows for the tokens, and rows that ask for the old down; also with fewer tokens than neurons."""
    draw = draws(seed)
    down, produced, wanted = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((HIDDEN, WIDTH), (tokens, WIDTH), (tokens, HIDDEN))
    )
    weight = 0.1 + torch.rand(tokens, generator=draw, dtype=torch.float64)
    heavy = double(produced * weight[:, None])
    pull = np.sqrt(ridge * (heavy**2).sum() / WIDTH) * np.eye(WIDTH)
    left = np.vstack([heavy, pull])
    right = np.vstack([double(wanted * weight[:, None]), pull @ double(down).T])
    best = np.linalg.lstsq(left, right, rcond=None)[0].T
    found = refitted_down(down, produced, wanted, weight, ridge)
    np.testing.assert_allclose(found.numpy(), best, rtol=1e-7, atol=1e-8)


@dataclass(frozen=True)
class Recorded(MoELayer):
    """Which experts get another down matrix."""

    kept: list[int] = field(default_factory=list)

    def set_down(self, number: int, down: torch.Tensor) -> None:
        self.kept.append(number)
        super().set_down(number, down)


class Layer:
    """Experts whose downs are refitted, in place and rounded to a dtype, to the output of other experts."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, routing: TokenRouting | None = None):
        self.experts = random_experts(EXPERTS, seed, dtype)
        self.inputs = random_tokens(TOKENS, seed)
        self.routing = routing or random_routing(TOKENS, EXPERTS, TOP_K, seed)
        other = random_routing(TOKENS, EXPERTS, TOP_K, seed + 1)
        self.wanted = torch.from_numpy(output64(self.inputs, other, random_experts(EXPERTS, seed + 1))).float()
        self.weight = 0.3 + torch.rand(TOKENS, generator=draws(seed + 2))
        self.kept: list[int] = []

    def refit(self, sweeps: int, ridge: float = 1e-6) -> torch.Tensor:
        layer = Recorded(self.experts, torch.zeros(EXPERTS, HIDDEN), Gate(TOP_K), silu, kept=self.kept)
        output = layer.output(self.inputs, self.routing)
        refit_downs(layer, self.inputs, self.routing, output, self.wanted, self.weight, ridge, sweeps)
        return output

    def output(self) -> np.ndarray:
        return output64(self.inputs, self.routing, self.experts)

    def error(self) -> float:
        return float(((double(self.weight)[:, None] * (self.output() - double(self.wanted))) ** 2).sum())

    def least_error(self) -> float:
        """Least squares in all downs together."""
        gates, heavy = gates64(self.routing, EXPERTS), double(self.weight)[:, None]
        heard = [gates[:, [k]] * neurons64(self.inputs, expert_at(self.experts, k)) for k in range(EXPERTS)]
        left, right = heavy * np.hstack(heard), heavy * double(self.wanted)
        return float(((left @ np.linalg.lstsq(left, right, rcond=None)[0] - right) ** 2).sum())


@quick
@given(seeds, st.sampled_from([1e-6, 1e-2, 1.0]))
def test_no_sweep_makes_it_worse(seed: int, ridge: float) -> None:
    """Not even the ridge does: it holds on to what there is. One more sweep at a time, each starting from the last."""
    layer = Layer(seed)
    errors = [layer.error()]
    for _ in range(4):
        layer.refit(1, ridge)
        errors.append(layer.error())
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_many_sweeps_come_to_the_joint_solution(seed: int) -> None:
    layer = Layer(seed)
    least = layer.least_error()
    layer.refit(1)
    once = layer.error()
    layer.refit(300)
    assert layer.kept == list(range(EXPERTS)) * 301
    assert layer.error() == pytest.approx(least, rel=1e-2)
    assert once > 1.05 * least


def test_one_expert_alone() -> None:
    """It gets its least-squares solution at once; the others have no tokens and are left as they are."""
    gate = 0.1 + torch.rand(TOKENS, 1, generator=draws(3))
    layer = Layer(0, routing=TokenRouting(torch.full((TOKENS, 1), 2), gate))
    before = {name: matrix.clone() for name, matrix in layer.experts.items()}
    layer.refit(1)
    assert layer.kept == [2]
    heavy = double(layer.weight)[:, None]
    heard = double(gate) * neurons64(layer.inputs, expert_at(before, 2))
    best = np.linalg.lstsq(heavy * heard, heavy * double(layer.wanted), rcond=None)[0].T
    np.testing.assert_allclose(double(layer.experts["down_proj"][2]), best, rtol=1e-3, atol=1e-3)
    before["down_proj"][2] = layer.experts["down_proj"][2]
    assert all(torch.equal(before[name], layer.experts[name]) for name in before)


@quick
@given(seeds, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 3))
def test_the_output_returned_is_that_of_the_downs_kept(seed: int, dtype: torch.dtype, sweeps: int) -> None:
    """With float32 experts `set_down` overwrites what was read; with bfloat16 it rounds. Both are in the output."""
    layer = Layer(seed, dtype)
    output = layer.refit(sweeps)
    np.testing.assert_allclose(output.double().numpy(), layer.output(), rtol=1e-3, atol=1e-4 * layer.output().std())
