"""The bargain over quadratic losses against SciPy, its symmetries, and who can agree at all.

SciPy judges: BFGS on the product of gains over all entries of W, and `linprog` for the existence of an agreement.
Neither knows the dual problem that is solved here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_dual import Dual, Optimum, conjugate_gradients, minimise_dual
from losses import RIDGE, LossSolution, loss_bargaining
from scipy.optimize import linprog, minimize
from torch import Tensor

from namex_hf.bargaining import AGREEMENT, NO_AGREEMENT, gram_of, nash_bargaining

seeds = st.integers(0, 10**6)
quick = settings(max_examples=25, deadline=None)


@dataclass(frozen=True)
class Table:
    """E [N, rows, cols], C [N, cols, cols], W_0 [rows, cols] and p [N], float64."""

    matrices: Tensor
    moments: Tensor
    start: Tensor
    power: Tensor

    def bargain(self, **options: object) -> LossSolution:
        return loss_bargaining(self.matrices, self.moments, self.start, self.power, **options)

    def losses(self, matrix: Tensor, ridge: float = RIDGE) -> Tensor:
        """l_i [N] by the definition."""
        difference = matrix - self.matrices.double()
        return (difference @ self.ridged(ridge) * difference).sum((1, 2))

    def ridged(self, ridge: float = RIDGE) -> Tensor:
        moments = self.moments.double()
        mean = moments.diagonal(dim1=1, dim2=2).mean(1)
        return moments + ridge * mean[:, None, None] * torch.eye(moments.shape[-1], dtype=torch.float64)

    def gains(self, matrix: Tensor, ridge: float = RIDGE) -> Tensor:
        return self.losses(self.start.double(), ridge) - self.losses(matrix, ridge)

    def merged(self, weights: Tensor, ridge: float = RIDGE) -> Tensor:
        """W = (sum w E C)(sum w C)^-1."""
        moments = weights[:, None, None] * self.ridged(ridge)
        return torch.linalg.solve(moments.sum(0), (self.matrices.double() @ moments).sum(0).T).T


def table(count: int, rows: int = 4, cols: int = 5, seed: int = 0, tokens: int = 12, common: float = 1.0) -> Table:
    """Players with a common part, inputs of different directions and numbers, and the plain mean to disagree at."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrices = normal(count, rows, cols) + common * normal(rows, cols)
    inputs = normal(count, tokens, cols) * normal(count, 1, cols).exp() + normal(count, 1, cols)
    power = 0.3 + 2 * torch.rand(count, generator=generator, dtype=torch.float64)
    return Table(matrices, inputs.mT @ inputs, matrices.mean(0), power)


def shifted(played: Table, seed: int, length: float = 1.0) -> Table:
    """The same with a disagreement point away from the mean."""
    generator = torch.Generator().manual_seed(seed)
    way = torch.randn(played.start.shape, generator=generator, dtype=torch.float64)
    return replace(played, start=played.start + length * way)


def orthonormal(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64)).Q


def assert_solves(found: LossSolution, played: Table, ridge: float = RIDGE, tolerance: float = 1e-8) -> None:
    """Stationarity, individual rationality and every field, from the arguments as given."""
    assert found.status == AGREEMENT
    inside = found.weights > 0
    gains = played.gains(found.matrix, ridge)
    assert (gains[inside] > 0).all()
    product = found.weights * gains / played.power
    torch.testing.assert_close(
        product[inside] / product[inside].mean(), torch.ones_like(product[inside]), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(found.matrix, played.merged(found.weights, ridge), rtol=tolerance, atol=tolerance)
    before, after = played.losses(played.start.double(), ridge), played.losses(found.matrix, ridge)
    scale = float(before.max())
    torch.testing.assert_close(found.gains, gains, rtol=1e-7, atol=1e-12 * scale)
    torch.testing.assert_close(found.losses_before, before, rtol=1e-9, atol=1e-12 * scale)
    torch.testing.assert_close(found.losses_after, after, rtol=1e-7, atol=1e-12 * scale)
    assert float(found.weights.sum()) == pytest.approx(int(inside.sum()), rel=1e-12)
    assert 0 <= found.residual < 1e-9
    assert 0 <= found.iterations <= 40


def assert_none(found: LossSolution, start: Tensor) -> None:
    assert found.status == NO_AGREEMENT
    assert found.residual == 1
    assert not found.weights.any()
    assert not found.gains.any()
    assert torch.equal(found.matrix, start.double())
    assert found.matrix.data_ptr() != start.data_ptr()
    assert torch.equal(found.losses_before, found.losses_after)


# --- against SciPy ---------------------------------------------------------------------------------------------------


class Judge:
    """-sum p log gain_i over all entries of W, by BFGS, with its gradient."""

    def __init__(self, played: Table) -> None:
        self.e, self.c = played.matrices.numpy(), played.ridged().numpy()
        self.p, self.shape = played.power.numpy(), played.start.shape
        self.before = self.losses(played.start.numpy())

    def losses(self, w: np.ndarray) -> np.ndarray:
        d = w - self.e
        return np.einsum("nij,njk,nik->n", d, self.c, d)

    def relative(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gains relative to the losses at disagreement, and their gradients."""
        w = x.reshape(self.shape)
        slopes = -2 * (w - self.e) @ self.c
        return 1 - self.losses(w) / self.before, slopes.reshape(len(self.e), -1) / self.before[:, None]

    def softly(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """A smooth stand-in for -min_i gain_i: what makes all gains positive."""
        gains, slopes = self.relative(x)
        parts = np.exp(-40 * (gains - gains.min()))
        return -gains.min() + np.log(parts.sum()) / 40, -(parts @ slopes) / parts.sum()

    def welfare(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        gains, slopes = self.relative(x)
        if gains.min() <= 0:
            return np.inf, np.zeros_like(x)
        return -float(self.p @ np.log(gains)), -(self.p / gains) @ slopes

    def best(self, start: Tensor) -> np.ndarray:
        first = minimize(self.softly, start.numpy().ravel(), jac=True, method="BFGS", options={"gtol": 1e-6})
        assert self.relative(first.x)[0].min() > 0, "the judge found no start"
        with np.errstate(invalid="ignore"):
            found = minimize(self.welfare, first.x, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
        assert np.abs(found.jac).max() < 1e-6, "the judge did not converge"
        return found.x


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["mean", "elsewhere"])
def test_equals_scipy(seed: int, kind: str) -> None:
    played = table(3, seed=seed)
    if kind == "elsewhere":
        played = shifted(played, seed)
    ours, judge = played.bargain(), Judge(played)
    x = judge.best(played.start)
    np.testing.assert_allclose(ours.matrix.numpy(), x.reshape(4, 5), atol=1e-6)
    assert judge.welfare(ours.matrix.numpy().ravel())[0] <= judge.welfare(x)[0] + 1e-12
    assert_solves(ours, played)


def test_maximises_the_product_of_gains() -> None:
    played = shifted(table(6, seed=4), 1)
    found = played.bargain()
    best = float(played.power @ played.gains(found.matrix).log())
    for way in torch.randn(300, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        for length in (1e-3, 1e-1):
            gains = played.gains(found.matrix + length * way)
            assert (gains <= 0).any() or float(played.power @ gains.log()) < best


def test_the_residual_bounds_what_is_missing() -> None:
    played = shifted(table(4, seed=3), 2)
    power = played.power / played.power.mean()
    dual = a_dual(played, power)
    best = float(power @ (played.gains(played.bargain().matrix)).log())
    before = played.losses(played.start)
    for seed in range(20):
        w = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
        point = dual.at(w)
        ratio = point.weights * point.gains / power
        if (ratio > 0).all():
            missing = best - float(power @ (point.gains * before).log())
            assert -1e-12 <= missing <= float((power * (ratio - 1 - ratio.log())).sum())


# --- the dual problem ------------------------------------------------------------------------------------------------


def a_dual(played: Table, power: Tensor) -> Dual:
    """As `loss_bargaining` sets it up: losses of 1 at the disagreement point."""
    before, ridged = played.losses(played.start), played.ridged()
    pulls = (played.matrices - played.start) @ ridged / before[:, None, None]
    mean = played.moments.diagonal(dim1=1, dim2=2).mean(1)
    return Dual(list(played.moments), 1 / before, RIDGE * mean / before, pulls, power)


def psi(played: Table, w: Tensor) -> Tensor:
    """max_W sum w_i (1 - l_i(W) / l_i(W_0)), by the definition."""
    before = played.losses(played.start)
    return (w * played.gains(played.merged(w / before)) / before).sum()


def test_gradient_and_curvature_are_derivatives() -> None:
    played = shifted(table(5, seed=7), 7)
    dual = a_dual(played, played.power)
    w = played.power.flip(0)
    at = dual.at(w)
    w = at.weights
    step, eye = 1e-4, torch.eye(5, dtype=torch.float64)
    slope = torch.stack([(psi(played, w + step * e) - psi(played, w - step * e)) / (2 * step) for e in eye])
    torch.testing.assert_close(at.gains, slope, rtol=1e-6, atol=1e-9)
    hessian = torch.stack([dual.curvature(at, e) for e in eye])
    differences = torch.stack([(dual.at(w + step * e).gains - dual.at(w - step * e).gains) / (2 * step) for e in eye])
    torch.testing.assert_close(hessian, differences, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-10, atol=1e-13)
    # The formula with R_i = X C_i - B_i, player by player; psi is of degree 1, so w itself is flat.
    drift = at.move @ played.ridged() / played.losses(played.start)[:, None, None] - dual.pulls
    halves = torch.linalg.solve_triangular(at.factor, drift.mT, upper=False).flatten(1)
    torch.testing.assert_close(hessian, 2 * halves @ halves.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(hessian @ w, torch.zeros_like(w), rtol=0, atol=1e-11)


def test_the_point_lies_where_the_ray_is_lowest() -> None:
    played = shifted(table(4, seed=1), 1)
    at = a_dual(played, played.power).at(played.power)
    assert float(at.weights @ at.gains) == pytest.approx(float(played.power.sum()), rel=1e-12)
    moment = (at.weights / played.losses(played.start))[:, None, None] * played.ridged()
    torch.testing.assert_close(at.factor @ at.factor.T, moment.sum(0))


def test_where_psi_vanishes_there_is_no_point() -> None:
    one = torch.ones(2, dtype=torch.float64)
    pulls = torch.tensor([[[1.0, 2.0]], [[-1.0, -2.0]]], dtype=torch.float64)
    dual = Dual([torch.eye(2)] * 2, one, 0 * one, pulls, one)
    assert dual.at(one) is None
    assert minimise_dual(dual, 0 * one) == Optimum(None, 1.0, 0)


def test_conjugate_gradients() -> None:
    factor = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, right = factor @ factor.T + torch.eye(7), factor[0]
    full = conjugate_gradients(lambda v: matrix @ v, right, 1e-13)
    torch.testing.assert_close(full, torch.linalg.solve(matrix, right), rtol=1e-9, atol=1e-11)
    rough = conjugate_gradients(lambda v: matrix @ v, right, 0.3)
    assert 1e-6 < float((matrix @ rough - right).norm() / right.norm()) <= 0.3
    # What the step rule rests on, wherever they are stopped.
    assert float(rough @ matrix @ rough) == pytest.approx(float(rough @ right), rel=1e-12)
    assert not conjugate_gradients(lambda v: v, torch.zeros(3), 0.1).any()


# --- symmetries ------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 8), seeds)
def test_solves_any_game_that_has_an_agreement(count: int, seed: int) -> None:
    # More entries than players: the gradients of the losses are independent, and all can gain.
    played = shifted(table(count, rows=4, cols=5, seed=seed), seed)
    assert_solves(played.bargain(), played)


@quick
@given(st.integers(2, 8), seeds)
def test_permutation(count: int, seed: int) -> None:
    played = shifted(table(count, seed=seed), seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    other = Table(played.matrices[order], played.moments[order], played.start, played.power[order])
    straight, permuted = played.bargain(), other.bargain()
    torch.testing.assert_close(permuted.weights, straight.weights[order], rtol=1e-7, atol=0)
    torch.testing.assert_close(permuted.matrix, straight.matrix, rtol=1e-7, atol=1e-9)


@quick
@given(st.integers(1, 8), seeds)
def test_units_of_players_and_of_powers_do_not_matter(count: int, seed: int) -> None:
    played = shifted(table(count, seed=seed), seed)
    unit = 10 ** (12 * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 6)
    other = replace(played, moments=played.moments * unit[:, None, None], power=7 * played.power)
    straight, scaled = played.bargain(), other.bargain()
    torch.testing.assert_close(scaled.matrix, straight.matrix, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(scaled.gains / unit, straight.gains, rtol=1e-6, atol=0)
    weights = scaled.weights * unit
    torch.testing.assert_close(weights / weights.mean(), straight.weights, rtol=1e-6, atol=0)


@quick
@given(st.integers(2, 6), seeds)
def test_rotations_of_rows_and_columns(count: int, seed: int) -> None:
    played = shifted(table(count, seed=seed), seed)
    left, right = orthonormal(4, seed), orthonormal(5, seed + 1)
    turned = Table(
        left @ played.matrices @ right, right.T @ played.moments @ right, left @ played.start @ right, played.power
    )
    straight, found = played.bargain(), turned.bargain()
    torch.testing.assert_close(found.matrix, left @ straight.matrix @ right, rtol=1e-7, atol=1e-9)


@quick
@given(st.integers(2, 6), seeds)
def test_duplicates_bargain_as_one_of_twice_the_power(count: int, seed: int) -> None:
    played = shifted(table(count, seed=seed), seed)
    twice = torch.cat([torch.arange(count), torch.tensor([0])])
    more = Table(played.matrices[twice], played.moments[twice], played.start, played.power[twice])
    found = more.bargain()
    assert float(found.weights[-1]) == pytest.approx(float(found.weights[0]), rel=1e-9)
    power = played.power.clone()
    power[0] *= 2
    torch.testing.assert_close(found.matrix, replace(played, power=power).bargain().matrix, rtol=1e-7, atol=1e-9)


def test_mirror_images_get_equal_weights() -> None:
    played = table(2, seed=5)
    matrices = torch.stack([played.matrices[0], -played.matrices[0]])
    moments = played.moments[:1].expand(2, 5, 5)
    start = torch.zeros(4, 5, dtype=torch.float64)
    start[0] = played.moments[0, 0]
    # W_0 at a right angle to the axis between the two, in the metric of C: neither is nearer.
    axis = matrices[0]
    start = start - axis * ((start @ moments[0] * axis).sum() / (axis @ moments[0] * axis).sum())
    found = loss_bargaining(matrices, moments, start, ridge=0.0)
    torch.testing.assert_close(found.weights, torch.ones(2, dtype=torch.float64), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.matrix, torch.zeros_like(start), rtol=0, atol=1e-10)


@quick
@given(st.integers(2, 6), seeds, st.floats(1.1, 100))
def test_power_is_worth_having(count: int, seed: int, factor: float) -> None:
    played = shifted(table(count, seed=seed), seed)
    power = played.power.clone()
    power[0] *= factor
    assert float(replace(played, power=power).bargain().gains[0]) > float(played.bargain().gains[0])


# --- where the answer is known ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 30])
def test_alone_a_player_gets_its_own_matrix(tokens: int) -> None:
    played = shifted(table(1, tokens=tokens), 3)
    found = played.bargain()
    assert_solves(found, played)
    torch.testing.assert_close(found.matrix, played.matrices[0], rtol=1e-9, atol=1e-9)
    assert float(found.weights[0]) == 1
    assert float(found.losses_after[0]) <= 1e-12 * float(found.losses_before[0])


def test_players_of_one_matrix_get_it() -> None:
    played = shifted(table(4, tokens=3), 3)
    played = replace(played, matrices=played.matrices[:1].expand(4, 4, 5))
    torch.testing.assert_close(played.bargain().matrix, played.matrices[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [2, 5, 12])
def test_with_moments_of_one_it_is_the_euclidean_bargain_of_another_disagreement(count: int) -> None:
    # gain_i = 2 <X, D_i> - |X|^2: the Euclidean game with d = |X|^2 / 2 for all, in the scale where its update is
    # sum w_i D_i / sum w_i times s, s^2 = 2 sum w_i, with w_i = p_i / gain_i.
    played = shifted(table(count, seed=count), 1)
    played = replace(played, moments=torch.eye(5, dtype=torch.float64).expand(count, 5, 5))
    found = played.bargain(ridge=0.0)
    raw = played.power / found.gains
    scale = (2 * raw.sum()).sqrt()
    claim = scale * (found.matrix - played.start).square().sum() / 2
    gram = gram_of(played.matrices - played.start)
    euclidean = nash_bargaining(gram, claim.expand(count), played.power)
    torch.testing.assert_close(euclidean.weights, scale * raw / raw.sum(), rtol=1e-7, atol=0)


def test_a_ridge_is_what_it_is_said_to_be() -> None:
    played = shifted(table(4, tokens=3, seed=2), 2)
    found = played.bargain(ridge=0.25)
    assert_solves(found, played, ridge=0.25)
    by_hand = replace(played, moments=played.ridged(0.25)).bargain(ridge=0.0)
    torch.testing.assert_close(found.matrix, by_hand.matrix, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.losses_before, by_hand.losses_before)


def test_directions_that_nobody_sees_are_averaged() -> None:
    played = shifted(table(3, tokens=30, seed=2), 2)
    moments = played.moments.clone()
    moments[:, 4] = moments[:, :, 4] = 0
    found = replace(played, moments=moments).bargain()
    ridges = found.weights * moments.diagonal(dim1=1, dim2=2).mean(1)
    mean = (ridges[:, None] * played.matrices[:, :, 4]).sum(0) / ridges.sum()
    torch.testing.assert_close(found.matrix[:, 4], mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [1e-3, 1e-6, 1e-9])
def test_moments_of_three_tokens(ridge: float) -> None:
    played = shifted(table(5, rows=6, cols=16, tokens=3, seed=8), 8)
    assert int(torch.linalg.matrix_rank(played.moments[0])) == 3
    assert_solves(played.bargain(ridge=ridge), played, ridge=ridge, tolerance=1e-5)
    with pytest.raises(ValueError, match="larger ridge"):
        played.bargain(ridge=0.0)


# --- who can agree ---------------------------------------------------------------------------------------------------


def everyone_can_gain(slopes: np.ndarray) -> bool:
    """Is there a direction in which all losses fall? By linear programming: max t, slopes . x >= t, t <= 1."""
    count, width = slopes.shape
    found = linprog(
        np.r_[np.zeros(width), -1.0],
        A_ub=np.c_[-slopes, np.ones(count)],
        b_ub=np.zeros(count),
        bounds=[(None, None)] * width + [(None, 1.0)],
        method="highs",
    )
    assert found.status == 0
    return bool(found.x[-1] > 1e-6)


def test_existence_equals_linear_programming() -> None:
    rng = np.random.default_rng(3)
    verdicts = []
    for _ in range(150):
        # Small integers: a combination of the slopes vanishes exactly or not nearly.
        count, cols = rng.integers(2, 6), rng.integers(1, 4)
        matrices = rng.integers(-2, 3, size=(count, 1, cols)).astype(float)
        matrices = matrices[np.abs(matrices).sum((1, 2)) > 0]
        if len(matrices) == 0:
            continue
        roots = rng.integers(-1, 2, size=(len(matrices), cols, cols)) + 2 * np.eye(cols)
        moments = roots.transpose(0, 2, 1) @ roots + np.eye(cols)
        expected = everyone_can_gain((matrices @ moments).reshape(len(matrices), -1))
        played = Table(
            torch.from_numpy(matrices),
            torch.from_numpy(moments),
            torch.zeros(1, cols, dtype=torch.float64),
            torch.from_numpy(rng.uniform(0.2, 2, len(matrices))),
        )
        found = played.bargain(ridge=0.0)
        assert (found.status == AGREEMENT) == expected, (matrices, moments)
        if expected:
            assert_solves(found, played, ridge=0.0)
        else:
            assert_none(found, played.start)
        verdicts.append(expected)
    assert min(sum(verdicts), len(verdicts) - sum(verdicts)) > 20


@quick
@given(st.integers(2, 8), seeds, st.floats(0, 4), st.sampled_from([3, 12]))
def test_no_agreement_at_a_pareto_optimum(count: int, seed: int, spread: float, tokens: int) -> None:
    played = table(count, seed=seed, tokens=tokens)
    generator = torch.Generator().manual_seed(seed)
    w = (spread * torch.randn(count, generator=generator, dtype=torch.float64)).exp()
    start = played.merged(w / played.moments.diagonal(dim1=1, dim2=2).sum(1))
    assert_none(replace(played, start=start).bargain(), start)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_a_pareto_optimum_that_was_rounded_is_one_still(kept: torch.dtype) -> None:
    played = table(6, rows=20, cols=30, tokens=60, seed=1)
    optimum = played.merged(torch.ones(6, dtype=torch.float64))
    assert_none(replace(played, start=optimum.to(kept)).bargain(), optimum.to(kept))
    # Where the format is not said, what it lost is there to be gained.
    lost = optimum.bfloat16().double()
    assert replace(played, start=lost).bargain().status == AGREEMENT
    assert_none(replace(played, start=lost).bargain(precision=torch.bfloat16), lost)


def test_what_bfloat16_loses_is_counted_in_squares() -> None:
    played = table(4, rows=20, cols=30, tokens=60, seed=1)
    start = played.merged(torch.ones(4, dtype=torch.float64)) + 0.015 * played.matrices[0]
    found = replace(played, start=start).bargain(precision=torch.bfloat16)
    assert found.status == AGREEMENT
    assert float((found.gains / found.losses_before).max()) < torch.finfo(torch.bfloat16).eps


def test_no_agreement_at_the_mean_where_all_see_the_same() -> None:
    played = table(7, rows=6, cols=8, tokens=20)
    one = played.moments[:1].expand(7, 8, 8)
    assert_none(replace(played, moments=one).bargain(), played.start)
    single = replace(played, matrices=played.matrices.float(), moments=one.float(), start=played.start.float())
    assert_none(single.bargain(), single.start)
    # What they see makes the difference: with their own moments there is something to share.
    assert_solves(played.bargain(), played)


def test_two_quarrel_among_many() -> None:
    played = table(12, rows=6, cols=8, common=0.0)
    start = torch.zeros(6, 8, dtype=torch.float64)
    matrices, moments = played.matrices.clone(), played.moments.clone()
    matrices[1], moments[1] = -matrices[0], moments[0]
    quarrel = Table(matrices, moments, start, played.power)
    assert_none(quarrel.bargain(), start)
    peace = torch.ones(12, dtype=torch.float64)
    peace[1] = 0
    assert replace(quarrel, power=peace).bargain().status == AGREEMENT  # No power, no veto.


def test_gains_far_below_the_losses_are_none() -> None:
    played = table(3, seed=2, tokens=20)
    start = played.merged(torch.ones(3, dtype=torch.float64)) + 1e-4 * played.matrices[0]
    near = replace(played, start=start)
    found = near.bargain()
    assert found.status == AGREEMENT
    assert float((found.gains / found.losses_before).max()) < 7e-6
    assert_none(replace(near, moments=near.moments.float()).bargain(), start)


# --- who plays -------------------------------------------------------------------------------------------------------


def test_who_has_no_stake_is_left_out() -> None:
    played = table(6, seed=1)
    moments = played.moments.clone()
    moments[4] = 0
    played = replace(played, moments=moments, start=played.matrices[2])
    found = played.bargain()
    rest = [0, 1, 3, 5]
    alone = Table(played.matrices[rest], moments[rest], played.start, played.power[rest]).bargain()
    assert found.weights[[2, 4]].tolist() == [0, 0]
    torch.testing.assert_close(found.weights[rest], alone.weights, rtol=1e-9, atol=0)
    assert float(found.weights.sum()) == pytest.approx(4)
    torch.testing.assert_close(found.matrix, alone.matrix, rtol=1e-9, atol=1e-11)
    assert_solves(found, played)
    assert float(found.gains[2]) < 0  # It had everything, and has no veto.
    assert float(found.gains[4]) == 0


def test_no_power_no_weight_no_veto() -> None:
    played = shifted(table(4, seed=1), 1)
    power = played.power.clone()
    power[1] = 0
    found = replace(played, power=power).bargain()
    rest = [0, 2, 3]
    alone = Table(played.matrices[rest], played.moments[rest], played.start, power[rest]).bargain()
    torch.testing.assert_close(found.matrix, alone.matrix, rtol=1e-9, atol=1e-11)
    assert float(found.weights[1]) == 0
    torch.testing.assert_close(found.gains, played.gains(found.matrix), rtol=1e-9, atol=1e-9)
    assert_none(replace(played, power=torch.zeros(4)).bargain(), played.start)


def test_nobody_has_a_stake() -> None:
    played = table(5)
    same = replace(played, matrices=played.start.expand(5, 4, 5))
    assert_none(same.bargain(), played.start)
    assert same.bargain().iterations == 0
    unused = replace(played, moments=torch.zeros(5, 5, 5, dtype=torch.float64))
    assert_none(unused.bargain(), played.start)


def test_a_base_that_was_stored_has_no_stake() -> None:
    played = table(3, rows=20, cols=30, tokens=60)
    kept = played.matrices[0].bfloat16()
    found = loss_bargaining(played.matrices, played.moments, kept)
    assert found.status == AGREEMENT
    assert found.weights[1:].all()
    assert float(found.weights[0]) == 0
    # Where the format is not said, what it lost is a stake.
    assert float(loss_bargaining(played.matrices, played.moments, kept.double()).weights[0]) > 0


def test_a_loss_that_is_rounding_of_the_moment_is_no_stake() -> None:
    played = table(3, cols=6, tokens=20)
    seen = torch.arange(1.0, 7.0, dtype=torch.float64) / 3
    away = torch.outer(torch.arange(-2.0, 2.0), torch.tensor([3.0, 0, -1, 0, 0, 0])).double() / 7
    start = played.matrices[0] + away
    moments = played.moments.clone()
    moments[0] = torch.outer(seen, seen)
    played = replace(played, moments=moments, start=start)
    assert float(played.losses(start, ridge=0.0)[0]) > 0  # Nothing, but for rounding.
    found = played.bargain(ridge=0.0)
    assert found.status == AGREEMENT
    assert float(found.weights[0]) == 0
    assert_solves(found, played, ridge=0.0)


def test_who_is_served_perfectly_on_few_tokens_keeps_a_veto() -> None:
    # W_0 equals E_0 on all that player 0 sees, but not E_0: its loss is that of the ridge, and W must not harm it.
    played = table(3, rows=4, cols=8, tokens=12)
    moments = played.moments.clone()
    moments[0] = 0
    moments[0, 0, 0] = 5.0
    start = played.matrices[0].clone()
    start[:, 1:] += 1
    found = Table(played.matrices, moments, start, played.power).bargain()
    assert float(found.weights[0]) > 0
    assert (found.gains > 0).all()
    torch.testing.assert_close(found.matrix[:, 0], start[:, 0], rtol=0, atol=0.05)


# --- precision, dtypes, input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_dtypes(dtype: torch.dtype) -> None:
    played = table(16, rows=20, cols=32, tokens=80, seed=3)
    moments = played.moments / played.moments.amax()
    matrices, moments = played.matrices.to(dtype), moments.to(dtype if dtype.itemsize > 1 else torch.bfloat16)
    start = matrices.float().mean(0)
    found = loss_bargaining(list(matrices), list(moments), start)
    assert found.matrix.dtype == found.weights.dtype == found.gains.dtype == torch.float64
    assert_solves(found, Table(matrices, moments, start, torch.ones(16, dtype=torch.float64)))
    assert found.iterations <= 8


@pytest.mark.parametrize("spread", [1e-3, 1e-6])
def test_powers_far_apart(spread: float) -> None:
    played = table(12, rows=10, cols=12, tokens=40)
    power = torch.logspace(0, np.log10(spread), 12, dtype=torch.float64)
    played = replace(played, power=power)
    assert_solves(played.bargain(), played, tolerance=1e-6)


def test_weights_without_a_certificate_are_not_handed_out() -> None:
    played = table(12, rows=10, cols=12, tokens=40)
    power = torch.logspace(0, -15, 12, dtype=torch.float64)
    assert_none(replace(played, power=power).bargain(), played.start)


def test_arguments_are_left_alone_and_gradients_are_cut() -> None:
    played = shifted(table(3), 1)
    matrices, moments = played.matrices.clone().requires_grad_(), played.moments.clone().requires_grad_()
    found = loss_bargaining(list(matrices), list(moments), played.start, [1, 2, 3])
    assert not found.matrix.requires_grad
    assert not found.weights.requires_grad
    assert torch.equal(matrices, played.matrices)
    assert torch.equal(moments, played.moments)


def test_a_skew_part_of_the_moments_has_no_say() -> None:
    played = shifted(table(3), 1)
    skew = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = replace(played, moments=played.moments + 1e-5 * (skew - skew.mT))
    torch.testing.assert_close(noisy.bargain().matrix, played.bargain().matrix, rtol=1e-9, atol=1e-11)
    dual = a_dual(played, played.power)
    other = replace(dual, moments=list(played.moments + skew - skew.mT))
    point, way = dual.at(played.power), played.power.flip(0)
    torch.testing.assert_close(other.curvature(point, way), dual.curvature(point, way), rtol=1e-10, atol=1e-13)


def negative(played: Table) -> Tensor:
    moments = played.moments.clone()
    moments[1] -= 2 * torch.diag(moments[1].diagonal())
    return moments


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: {"matrices": p.matrices[:0]}, "0 matrices"),
        (lambda p: {"moments": p.moments[:2]}, "3 matrices and 2 moments"),
        (lambda p: {"disagreement": p.start[0]}, r"disagreement has the shape \[5\]"),
        (lambda p: {"disagreement": p.start[:0]}, "not empty"),
        (lambda p: {"precision": "bfloat16"}, "precision is 'bfloat16'"),
        (lambda p: {"disagreement": p.start.T}, r"matrix 0 has the shape \[4, 5\]"),
        (lambda p: {"moments": p.moments[:, :4]}, r"moment 0 has the shape \[4, 5\]"),
        (lambda p: {"matrices": p.matrices.long()}, "matrix 0 has the dtype torch.int64"),
        (lambda p: {"moments": p.moments * torch.nan}, "moment 0 has 25 entries"),
        (lambda p: {"disagreement": p.start * torch.inf}, "disagreement has 20 entries"),
        (lambda p: {"moments": p.moments.tril()}, "moment 0 is not symmetric"),
        (lambda p: {"moments": negative(p)}, "moment 1 is not positive semidefinite"),
        (lambda p: {"power": torch.ones(4)}, r"power has the shape \[4\]"),
        (lambda p: {"power": [1.0, -1.0, 1.0]}, "power is"),
        (lambda p: {"power": [1.0, float("nan"), 1.0]}, "power is"),
        (lambda p: {"ridge": -1.0}, "ridge is -1.0"),
        (lambda p: {"ridge": float("nan")}, "ridge is nan"),
    ],
)
def test_refused(change: object, said: str) -> None:
    played = table(3)
    arguments = {"matrices": played.matrices, "moments": played.moments, "disagreement": played.start}
    with pytest.raises(ValueError, match=said):
        loss_bargaining(**{**arguments, **change(played)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_on_the_accelerator() -> None:
    played = shifted(table(8, rows=10, cols=12), 1)
    there = loss_bargaining(played.matrices.cuda(), played.moments.cuda(), played.start.cuda(), played.power)
    assert there.matrix.device.type == "cuda"
    torch.testing.assert_close(there.matrix.cpu(), played.bargain().matrix, rtol=1e-9, atol=1e-10)
