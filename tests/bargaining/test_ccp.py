"""The convex-concave procedure: on its way to the exact solution, with the same statuses, and asking for its extra."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from namex_hf.bargaining import AGREEMENT, NO_AGREEMENT, domain_gram, nash_bargaining
from namex_hf.bargaining.ccp import ccp_bargaining
from namex_hf.errors import MissingExtraError, NamexError

BUDGETS = (2, 5, 20, 40, 60)


@pytest.fixture(scope="module")
def extra() -> None:
    pytest.importorskip("cvxpy")


with_extra = pytest.mark.usefixtures("extra")


def game(count: int, seed: int, conflict: float = 0.0, spread: float = 3.0) -> Tensor:
    """Gram matrix of unrelated players, moved towards a sum of zero by `conflict`, then with lengths up to `spread`."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, 4 * count, generator=generator, dtype=torch.float64)
    vectors = vectors - conflict * vectors.mean(0)
    vectors = vectors * spread ** torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return vectors @ vectors.T


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found / exact - 1).abs().max())


@with_extra
@pytest.mark.parametrize("count", [1, 2, 8, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_two_iterations_are_enough_for_players_of_like_lengths(count: int, seed: int) -> None:
    k = game(count, seed)
    found = ccp_bargaining(k)
    assert found.status == AGREEMENT
    assert 1 <= int(found.iterations) <= 2
    assert distance(found.weights, nash_bargaining(k).weights) < 1e-5


@with_extra
@pytest.mark.parametrize(("count", "conflict", "spread"), [(16, 0.5, 30.0), (16, 0.9, 30.0), (60, 0.9, 30.0)])
@pytest.mark.parametrize("seed", [3, 4])
def test_converges_to_the_exact_solution(count: int, conflict: float, spread: float, seed: int) -> None:
    k = game(count, seed, conflict, spread)
    exact = nash_bargaining(k).weights
    found = {budget: ccp_bargaining(k, budget) for budget in BUDGETS}
    for budget, solution in found.items():
        assert solution.status == AGREEMENT
        assert int(solution.iterations) <= budget
        # The certificate, from the arguments as given.
        measured = float((solution.weights * (k @ solution.weights) - 1).abs().max())
        assert float(solution.residual) == pytest.approx(measured, rel=1e-6, abs=1e-12)
    distances = [distance(found[budget].weights, exact) for budget in BUDGETS]
    assert distances[0] > 0.1
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(distances))
    assert distances[-1] < 1e-5
    assert float(found[60].residual) < 1e-4


@with_extra
def test_every_point_satisfies_the_constraints() -> None:
    k = game(16, 3, 0.5, 30.0)
    for budget in (1, 2, 3, 5):
        weights = ccp_bargaining(k, budget).weights
        assert (weights * (k @ weights) > 1 - 1e-5).all()


@with_extra
def test_standing_still_ends_it() -> None:
    assert 2 <= int(ccp_bargaining(game(8, 0), 60).iterations) <= 5


@with_extra
@pytest.mark.parametrize("exponent", [-8, -3, 4, 10])
def test_the_unit_of_the_gram_does_not_matter(exponent: int) -> None:
    k = game(16, 5, 0.5, 30.0)
    straight, scaled = ccp_bargaining(k, 5), ccp_bargaining(k * 10.0 ** (2 * exponent), 5)
    assert float(straight.residual) > 0.1  # on the way, where the path shows
    torch.testing.assert_close(scaled.weights * 10.0**exponent, straight.weights, rtol=1e-3, atol=0)


# --- who agrees ------------------------------------------------------------------------------------------------------


@with_extra
def test_no_agreement_is_said_as_by_the_exact_solver() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(8, 3000, generator=generator).bfloat16()
    mean = domain_gram(experts, experts.float().mean(0))
    opposed = torch.tensor([[1.0, -2.0], [-2.0, 4.0]])
    for k in (mean, opposed, torch.zeros(3, 3)):
        found = ccp_bargaining(k, precision=torch.bfloat16)
        assert found.status == nash_bargaining(k, precision=torch.bfloat16).status == NO_AGREEMENT
        assert not found.weights.any()
        assert float(found.residual) == 1
        assert int(found.iterations) == 0
    close = torch.tensor([[1.0, -1 + 1e-6], [-1 + 1e-6, 1.0]], dtype=torch.float64)
    assert ccp_bargaining(close, precision=torch.float64).status == AGREEMENT
    assert ccp_bargaining(close, precision=torch.bfloat16).status == NO_AGREEMENT


@with_extra
def test_batch_and_players_without_stake() -> None:
    grams = torch.stack([game(5, seed) for seed in range(4)]).reshape(2, 2, 5, 5)
    grams[0, 1, 2] = grams[0, 1, :, 2] = 0
    grams[1, 0] = 0
    found, exact = ccp_bargaining(grams), nash_bargaining(grams)
    assert found.weights.shape == (2, 2, 5)
    assert found.residual.shape == found.iterations.shape == (2, 2)
    assert found.status == exact.status == [AGREEMENT, AGREEMENT, NO_AGREEMENT, AGREEMENT]
    np.testing.assert_allclose(found.weights.numpy(), exact.weights.numpy(), rtol=1e-5)
    assert found.weights[0, 1, 2] == 0
    assert ccp_bargaining(torch.zeros(0, 3, 3)).weights.shape == (0, 3)


@with_extra
def test_a_solver_that_fails_leaves_the_last_point(monkeypatch: pytest.MonkeyPatch) -> None:
    import cvxpy

    k = game(16, 3, 0.5, 30.0)
    one, solve, calls = ccp_bargaining(k, 1), cvxpy.Problem.solve, []

    def fail_after(good: int) -> None:
        calls.clear()

        def patched(problem, *args, **kwargs):
            calls.append(1)
            if len(calls) > good:
                raise cvxpy.SolverError("the solver has had enough")
            return solve(problem, *args, **kwargs)

        monkeypatch.setattr(cvxpy.Problem, "solve", patched)

    fail_after(1)
    stopped = ccp_bargaining(k, 20)
    assert stopped.status == AGREEMENT
    assert torch.equal(stopped.weights, one.weights)
    assert len(calls) == int(stopped.iterations) == 2
    fail_after(0)
    nothing = ccp_bargaining(k, 20)
    assert nothing.status == NO_AGREEMENT
    assert not nothing.weights.any()
    assert float(nothing.residual) == 1


# --- input -----------------------------------------------------------------------------------------------------------


def test_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'namex-hf\[ccp\]'") as caught:
        ccp_bargaining(torch.eye(2))
    assert isinstance(caught.value, NamexError)


@pytest.mark.parametrize("iterations", [0, -1])
def test_refuses_no_iterations(iterations: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ccp_bargaining(torch.eye(2), iterations)


def test_refuses_what_the_exact_solver_refuses() -> None:
    with pytest.raises(ValueError, match="not symmetric"):
        ccp_bargaining(torch.tensor([[1.0, 0.5], [0.2, 1.0]]))
