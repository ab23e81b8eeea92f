"""The game over losses in a group's merge: every way to play it, and against a general optimiser."""

import numpy as np
import pytest
import torch
from game import by_losses, curved_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from namex_hf.merging.curvature import second_moment
from namex_hf.merging.members import GAMES, merge_members
from namex_hf.merging.routing import TokenRouting
from tests.helpers.checkpoints import PROJECTIONS
from tests.helpers.groups import (
    ALIGN,
    EXPERTS,
    INPUTS,
    POWER,
    RIDGE,
    ROUTING,
    TOKENS,
    every_way,
    group,
    merge,
    moments,
    tuning,
)
from tests.helpers.mixtures import WIDTH, draws, random_experts, random_routing
from tests.helpers.reference import double, usage64

EVERY_WAY = every_way(point=("zero", "mean"), metric=("calibrated",), power=POWER)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the time of a test: others see a package without the experiment."""
    monkeypatch.setitem(GAMES, "calibrated", by_losses)


@pytest.mark.parametrize("align", ALIGN)
def test_a_group_without_tokens(align: str) -> None:
    """It has nothing to correlate and nothing to lose, and merges to the plain mean."""
    experts = random_experts(EXPERTS + 3, 0)
    for how in EVERY_WAY:
        members = group(experts, (7, 6, 8), align)
        merged = merge(members, how)
        assert all(matrix.isfinite().all() for matrix in merged.values())
        for name in PROJECTIONS:
            torch.testing.assert_close(merged[name], members.matrices[name].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("align", ALIGN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way(align: str, dtype: torch.dtype) -> None:
    """Finite, of the experts' dtype and shape; weights on the simplex, one game a matrix."""
    experts = random_experts(EXPERTS, 0, dtype)
    for how in EVERY_WAY:
        merged, record = merge_members(group(experts, align=align), how)
        assert [game["projections"] for game in record] == [[name] for name in PROJECTIONS]
        for game in record:
            assert sum(game["weights"]) == pytest.approx(1)
            assert min(game["weights"]) > 0
        for name in PROJECTIONS:
            assert merged[name].dtype == dtype
            assert merged[name].shape == experts[name][0].shape
            assert merged[name].isfinite().all()


@pytest.mark.parametrize("align", ALIGN)
def test_equal_experts_merge_to_themselves(align: str) -> None:
    one = random_experts(1, 0, torch.bfloat16)
    experts = one.map(lambda matrix: matrix.repeat(EXPERTS, 1, 1))
    for how in EVERY_WAY:
        merged, record = merge_members(group(experts, align=align), how)
        for name in PROJECTIONS:
            torch.testing.assert_close(merged[name], one[name][0], rtol=2**-7, atol=1e-4)
        assert all(game["weights"] == pytest.approx([1 / 3] * 3) for game in record)


def curved_mean(weights, matrices, curved) -> np.ndarray:
    top = np.einsum("n,nrc,ncd->rd", weights, matrices, curved)
    return top @ np.linalg.inv(np.einsum("n,ncd->cd", weights, curved))


def losses(matrix, matrices, curved) -> np.ndarray:
    return np.einsum("nrc,ncd,nrd->n", matrix - matrices, curved, matrix - matrices)


def bargained(matrices, curved, point, power) -> np.ndarray:
    """Weights p / gain, summing to 1, where W of that form makes sum p log gain largest: Nelder-Mead over log w."""
    before = losses(point, matrices, curved)

    def gains(logs: np.ndarray) -> np.ndarray:
        return 1 - losses(curved_mean(np.exp(logs), matrices, curved), matrices, curved) / before

    def welfare(logs: np.ndarray) -> float:
        gain = gains(logs)
        return 1e6 * (1 - gain.min()) if gain.min() <= 0 else -float(power @ np.log(gain))

    best = -np.log(before)
    for _ in range(4):
        options = {"xatol": 1e-10, "fatol": 1e-13, "maxiter": 4000, "maxfev": 4000}
        best = minimize(welfare, best, method="Nelder-Mead", options=options).x
    weights = power / (gains(best) * before)
    return weights / weights.sum()


@pytest.mark.parametrize("power", POWER)
@pytest.mark.parametrize("point", ["zero", "mean"])
def test_losses_against_a_general_optimiser(point: str, power: str) -> None:
    """With the zero point the first has no stake and keeps 1/n; the others share the rest."""
    members = group(random_experts(EXPERTS, 0), (4, 1, 2, 0))
    weights, record = by_losses(members, tuning(point=point, metric="calibrated", power=power))
    usage = usage64(ROUTING, EXPERTS)[[4, 1, 2, 0]]
    playing = slice(1 if point == "zero" else 0, None)
    for name, game in zip(PROJECTIONS, record, strict=True):
        matrices, plain = double(members.matrices[name]), np.stack(moments(members)[name])
        ridge = RIDGE * np.einsum("ncc->n", plain) / plain.shape[-1]
        start = matrices[0] if point == "zero" else matrices.mean(0)
        powers = {"equal": np.ones(4), "usage": usage, "loss": losses(start, matrices, plain)}[power][playing]
        curved = plain + ridge[:, None, None] * np.eye(plain.shape[-1])
        wanted = bargained(matrices[playing], curved[playing], start, powers / powers.mean())
        after = curved_mean(wanted, matrices[playing], curved[playing])
        np.testing.assert_allclose(game["losses_before"], losses(start, matrices, curved), rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(game["losses_after"], losses(after, matrices, curved), rtol=1e-2)
        if point == "zero":
            wanted = np.array([0.25, *(0.75 * wanted)])
        np.testing.assert_allclose(weights[name].numpy(), wanted, rtol=1e-3)
        assert game["weights"] == weights[name].tolist()
        assert game["spread"] == pytest.approx(wanted.std() / wanted.mean(), rel=1e-2)
        assert game["status"] == "agreement"
        assert game["projections"] == [name]


def test_losses_without_agreement() -> None:
    """Two on opposite sides of the first: all weigh alike, and the record says why."""
    experts = random_experts(EXPERTS, 0)
    for name in PROJECTIONS:
        experts[name][2] = 2 * experts[name][4] - experts[name][1]
    routing = TokenRouting(torch.tensor([[1, 2, 4]]).repeat(TOKENS, 1), torch.ones(TOKENS, 3))
    weights, record = by_losses(group(experts, routing=routing), tuning(metric="calibrated"))
    for name, game in zip(PROJECTIONS[:2], record[:2], strict=True):  # downs see inputs of their own
        assert game["status"] == "no_agreement"
        assert weights[name].tolist() == pytest.approx([1 / 3] * 3)
    assert [game["projections"] for game in record] == [[name] for name in PROJECTIONS]


def test_change_that_no_token_sees() -> None:
    """Power by loss where rounding could make the loss of one that loses nothing negative."""
    for seed in range(20):
        experts, routing = random_experts(EXPERTS, seed), random_routing(TOKENS, EXPERTS, 2, seed)
        few = TokenRouting(torch.where(routing.index == 1, 0, routing.index), routing.value)
        few.index[0, 0] = 1
        seen = INPUTS[0].double()
        for name in ("gate_proj", "up_proj"):
            change = torch.randn(WIDTH, len(seen), dtype=torch.float64, generator=draws(seed))
            change -= torch.outer(change @ seen, seen) / seen.square().sum()
            experts[name][1] = experts[name][4] + change
        merged = merge(group(experts, (4, 1), routing=few), tuning(metric="calibrated", power="loss"))
        assert all(matrix.isfinite().all() for matrix in merged.values())


ROWS, COLUMNS = 4, 5


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


def gates(seed: int, count: int) -> torch.Tensor:
    return 0.2 + torch.rand(count, generator=draws(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_curved_loss_is_the_squared_error(seed: int, tokens: int) -> None:
    matrix, expert = drawn(seed, 2, ROWS, COLUMNS)
    inputs, gate = drawn(seed + 1, tokens, COLUMNS), gates(seed + 2, tokens)
    wanted = sum(float(g * ((matrix - expert) @ x).norm()) ** 2 for g, x in zip(gate, inputs, strict=True))
    assert curved_loss(matrix, expert, second_moment(inputs, gate)) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_curved_loss_is_never_negative() -> None:
    """A change that no token sees, under a moment that float32 has rounded."""
    losses = []
    for seed in range(50):
        seen = drawn(seed, 1, COLUMNS).float()
        unseen = drawn(seed + 100, ROWS, COLUMNS)
        unseen -= (unseen @ seen.double().T) * seen.double() / seen.double().square().sum()
        losses.append(curved_loss(unseen, torch.zeros(ROWS, COLUMNS), second_moment(seen, torch.ones(1))))
    assert min(losses) >= 0
