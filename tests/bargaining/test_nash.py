"""The exact Nash solution against SciPy, its symmetries, and who can agree at all.

SciPy judges: a trust region and MINPACK on log a for the weights, `linprog` for the existence of an agreement; none
shares code or method with us.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize, root
from torch import Tensor

from namex_hf.bargaining import AGREEMENT, NO_AGREEMENT, NashSolution, domain_gram, gram_of, nash_bargaining

seeds = st.integers(0, 10**6)
sizes = st.integers(1, 12)
quick = settings(max_examples=25, deadline=None)


def players(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """[N, D] in float64. A negative shift against the common direction makes players conflict."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + shift


def gram(count: int, seed: int = 0, width: int | None = None) -> Tensor:
    vectors = players(count, width or 2 * count + 2, seed)
    return vectors @ vectors.T


def uniform(count: int, seed: int, low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)


def by_scipy(k: Tensor, d: Tensor | None = None, p: Tensor | None = None) -> np.ndarray:
    """a > 0 with K a = p / a + d, in the variables u = log(a length), where positivity needs no care."""
    lengths = k.diagonal().sqrt().numpy()
    c = k.numpy() / np.outer(lengths, lengths)
    delta = np.zeros(len(c)) if d is None else d.numpy() / lengths
    power = np.ones(len(c)) if p is None else p.numpy()

    def equation(u: np.ndarray) -> np.ndarray:
        b = np.exp(u)
        return b * (c @ b - delta) - power

    def jacobian(u: np.ndarray) -> np.ndarray:
        b = np.exp(u)
        return b[:, None] * c * b[None, :] + np.diag(b * (c @ b - delta))

    def objective(u: np.ndarray) -> float:
        b = np.exp(u)
        return float(0.5 * b @ c @ b - delta @ b - power @ u)

    start = minimize(objective, 0.5 * np.log(power), jac=equation, hess=jacobian, method="trust-exact")
    best = root(equation, start.x, jac=jacobian, method="hybr", options={"xtol": 1e-14})
    assert np.abs(best.fun / power).max() < 1e-10, "the judge did not converge"
    return np.exp(best.x) / lengths


def assert_solves(solution: NashSolution, k: Tensor, d: Tensor | float = 0.0, p: Tensor | float = 1.0) -> None:
    """The optimality conditions, from the arguments as given: positive weights, and K a = p / a + d."""
    a = solution.weights
    assert solution.status == AGREEMENT
    assert (a > 0).all()
    right = p / a + d
    torch.testing.assert_close(k.double() @ a / right, torch.ones_like(a), rtol=0, atol=1e-8)
    assert float(solution.residual) < 1e-9
    assert 1 <= int(solution.iterations) <= 25


def assert_none(solution: NashSolution) -> None:
    assert solution.status == NO_AGREEMENT
    assert not solution.weights.any()
    assert torch.equal(solution.residual, torch.ones_like(solution.residual))


# --- against SciPy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8, 17, 60])
@pytest.mark.parametrize("kind", ["plain", "disagreement", "power", "both"])
def test_equals_scipy(count: int, kind: str) -> None:
    k = gram(count, seed=count)
    d = k.diagonal().sqrt() * uniform(count, count, -2, 2) if kind in ("disagreement", "both") else None
    p = uniform(count, count + 5, 0.1, 3) if kind in ("power", "both") else None
    ours = nash_bargaining(k, d, p)
    np.testing.assert_allclose(ours.weights.numpy(), by_scipy(k, d, p), rtol=1e-8)
    assert_solves(ours, k, 0.0 if d is None else d, 1.0 if p is None else p)


def test_two_players_in_closed_form() -> None:
    # Equal lengths: a = 1 / (length sqrt(1 + cos)). One player: a = sqrt(p / K).
    for cos in (-0.999, -0.5, 0.0, 0.5, 0.999):
        a = nash_bargaining(4 * torch.tensor([[1.0, cos], [cos, 1.0]], dtype=torch.float64)).weights
        np.testing.assert_allclose(a.numpy(), np.full(2, 0.5 / np.sqrt(1 + cos)), rtol=1e-11)
    one = nash_bargaining(torch.tensor([[9.0]], dtype=torch.float64), power=torch.tensor([4.0]))
    assert one.weights.item() == pytest.approx(2 / 3, rel=1e-14)


def test_maximises_the_product_of_gains() -> None:
    vectors = players(6, 9, seed=4)
    k = vectors @ vectors.T
    d = k.diagonal().sqrt() * uniform(6, 4, -1, 0)
    step = nash_bargaining(k, d).weights @ vectors

    def welfare(x: Tensor) -> float:
        return float((x @ vectors.T - d).log().sum())

    best = welfare(step)
    for direction in players(200, 9, seed=5):
        trial = step + 0.05 * direction
        trial = trial * step.norm() / trial.norm()  # Steps of the same length: that is what is bargained over.
        assert not welfare(trial) > best


# --- symmetries ------------------------------------------------------------------------------------------------------


@quick
@given(sizes, seeds)
def test_permutation(count: int, seed: int) -> None:
    k, d, p = gram(count, seed), uniform(count, seed, -1, 1), uniform(count, seed + 2, 0.2, 2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    straight = nash_bargaining(k, d, p).weights
    permuted = nash_bargaining(k[order][:, order], d[order], p[order]).weights
    torch.testing.assert_close(permuted, straight[order], rtol=1e-9, atol=0)


@quick
@given(sizes, seeds, st.floats(-6, 6))
def test_common_scale(count: int, seed: int, exponent: float) -> None:
    k, factor = gram(count, seed), 10**exponent
    scaled = nash_bargaining(k * factor**2).weights
    torch.testing.assert_close(scaled * factor, nash_bargaining(k).weights, rtol=1e-9, atol=0)


@quick
@given(sizes, seeds)
def test_rescaled_players(count: int, seed: int) -> None:
    k, c = gram(count, seed), 10 ** uniform(count, seed, -6, 6)
    d = k.diagonal().sqrt() * uniform(count, seed, -1, 1)
    rescaled = nash_bargaining(c[:, None] * k * c, c * d)
    torch.testing.assert_close(rescaled.weights * c, nash_bargaining(k, d).weights, rtol=1e-9, atol=0)
    assert float(rescaled.residual) < 1e-10


@quick
@given(sizes, seeds)
def test_length_of_the_update(count: int, seed: int) -> None:
    k, p = gram(count, seed), uniform(count, seed, 0.01, 5)
    a = nash_bargaining(k, power=p).weights
    assert float(a @ k @ a) == pytest.approx(float(p.sum()), rel=1e-10)


@quick
@given(st.integers(2, 10), seeds)
def test_duplicates_share_equally(count: int, seed: int) -> None:
    k = gram(count, seed)
    twice = torch.cat([torch.arange(count), torch.tensor([0])])
    a = nash_bargaining(k[twice][:, twice]).weights
    assert float(a[-1]) == pytest.approx(float(a[0]), rel=1e-12)
    # Two copies bargain as one player of power 2, who would hold the sum of their weights.
    power = torch.ones(count)
    power[0] = 2
    merged = nash_bargaining(k, power=power).weights
    assert float(merged[0]) == pytest.approx(2 * float(a[0]), rel=1e-9)


# --- who can agree ---------------------------------------------------------------------------------------------------


def best_worst_gain(vectors: np.ndarray, d: np.ndarray) -> float:
    """max over moves x of min_i (t_i . x - d_i), cut off at 1: positive exactly where an agreement exists."""
    count, width = vectors.shape
    cost = np.r_[np.zeros(width), -1.0]
    rows = np.c_[-vectors, np.ones(count)]
    found = linprog(cost, A_ub=rows, b_ub=-d, bounds=[(None, None)] * width + [(None, 1.0)], method="highs")
    assert found.status == 0
    return float(found.x[-1])


@pytest.mark.parametrize("kind", ["zero", "integers"])
def test_existence_equals_linear_programming(kind: str) -> None:
    rng = np.random.default_rng(7)
    verdicts = []
    for _ in range(150):
        # Small integers: hulls through 0 and d . v = 0 are hit exactly, and no game lies close to the border otherwise.
        vectors = rng.integers(-2, 3, size=(rng.integers(2, 7), rng.integers(1, 4))).astype(float)
        vectors = vectors[np.abs(vectors).sum(1) > 0]
        if len(vectors) == 0:
            continue
        d = np.zeros(len(vectors)) if kind == "zero" else rng.integers(-3, 3, size=len(vectors)).astype(float)
        expected = best_worst_gain(vectors, d) > 1e-6
        k = torch.from_numpy(vectors @ vectors.T)
        solution = nash_bargaining(k, torch.from_numpy(d))
        assert (solution.status == AGREEMENT) == expected, (vectors, d)
        if expected:
            assert_solves(solution, k, torch.from_numpy(d))
        verdicts.append(expected)
    assert min(sum(verdicts), len(verdicts) - sum(verdicts)) > 20


@pytest.mark.parametrize("stored", ["unrounded", "bfloat16"])
@pytest.mark.parametrize("accumulated", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 8, 16, 60])
def test_base_is_the_mean_of_bfloat16_experts(count: int, accumulated: torch.dtype, stored: str) -> None:
    experts = players(count, 5000, seed=count).bfloat16()
    base = experts.float().mean(0)
    if stored == "bfloat16":
        base = base.bfloat16()
    k = domain_gram(experts, base).to(accumulated)
    assert_none(nash_bargaining(k, precision=torch.bfloat16))
    unit = k.diagonal().mean()
    assert_none(nash_bargaining(k / unit, (k / unit).mean(1), precision=torch.bfloat16))


@pytest.mark.parametrize("count", [2, 8, 16, 60, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_base_is_the_mean_in_higher_precision(count: int, dtype: torch.dtype) -> None:
    experts = players(count, 2000, seed=count).to(dtype)
    assert_none(nash_bargaining(domain_gram(experts, experts.mean(0)), precision=dtype))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 16, 64, 256])
def test_healthy_players_agree_at_every_precision(count: int, precision: torch.dtype) -> None:
    orthogonal = torch.eye(count, dtype=torch.float64)
    # Every pair conflicts, and 3/4 of the way to the point where the sum of all players vanishes.
    conflicting = orthogonal * (1 + 0.75 / count) - 0.75 / count
    for k in (orthogonal, conflicting):
        assert_solves(nash_bargaining(k, precision=precision), k)


def test_antiparallel_players() -> None:
    k = torch.tensor([[1.0, -2.0], [-2.0, 4.0]])
    assert_none(nash_bargaining(k))
    others = torch.zeros(6, 6)
    others[:2, :2], others[2:, 2:] = k, torch.eye(4)
    assert_none(nash_bargaining(others))  # Two who cannot agree veto everyone.
    # What each already has is less than nothing: then even standing still is a gain for both.
    assert_solves(nash_bargaining(k, torch.tensor([-1.0, -1.0])), k, torch.tensor([-1.0, -1.0]))


def test_nearly_antiparallel_players_are_judged_by_precision() -> None:
    cos = -1 + 1e-7
    k = torch.tensor([[1.0, cos], [cos, 1.0]], dtype=torch.float64)
    assert nash_bargaining(k).status == AGREEMENT
    assert_none(nash_bargaining(k, precision=torch.float32))
    assert_none(nash_bargaining(k.float()))


def test_two_quarrel_among_many() -> None:
    # The weights at the solution do not show it (their combination is too long); the closer test does.
    k = torch.eye(64, dtype=torch.float64)
    k[0, 1] = k[1, 0] = -1 + 1e-5
    assert_none(nash_bargaining(k, precision=torch.float32))
    assert_solves(nash_bargaining(k), k)


def test_what_coarse_formats_lose() -> None:
    vectors = players(8, 4000, seed=6)
    vectors = vectors - vectors.mean(0)
    stored = vectors.to(torch.float8_e4m3fn).double()
    assert nash_bargaining(gram_of(stored), precision=torch.bfloat16).status == AGREEMENT
    assert_none(nash_bargaining(gram_of(stored), precision=torch.float8_e4m3fn))
    assert_solves(nash_bargaining(torch.eye(256), precision=torch.float8_e4m3fn), torch.eye(256))
    assert_none(nash_bargaining(gram_of(vectors).bfloat16()))


def test_gains_far_below_what_is_natural_are_none() -> None:
    k = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert_none(nash_bargaining(k, torch.full((2,), -1e-7)))
    assert nash_bargaining(k, torch.full((2,), -1e-3)).status == AGREEMENT


def test_weights_without_a_certificate_are_not_handed_out() -> None:
    k = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    assert nash_bargaining(k, power=torch.tensor([1.0, 1e-9])).status == AGREEMENT
    assert_none(nash_bargaining(k, power=torch.tensor([1.0, 1e-20])))


def test_scales_of_players_do_not_change_who_agrees() -> None:
    vectors = players(12, 200, seed=3)
    vectors = vectors - vectors.mean(0)
    lengths = 10 ** torch.linspace(-6, 6, 12, dtype=torch.float64)
    assert_none(nash_bargaining(gram_of(vectors * lengths[:, None])))


# --- who plays -------------------------------------------------------------------------------------------------------


def test_base_is_an_expert() -> None:
    experts = players(10, 3000, seed=1).bfloat16()
    k = domain_gram(experts, experts[3])
    a = nash_bargaining(k, precision=torch.bfloat16)
    rest = [i for i in range(10) if i != 3]
    alone = nash_bargaining(k[rest][:, rest], precision=torch.bfloat16)
    assert a.weights[3] == 0
    assert_solves(alone, k[rest][:, rest])
    torch.testing.assert_close(a.weights[rest], alone.weights, rtol=1e-12, atol=0)


def test_no_stake_counts_whatever_it_claims() -> None:
    k = torch.diag(torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64))
    a = nash_bargaining(k, torch.tensor([0.0, 5.0, 0.0]))
    torch.testing.assert_close(a.weights, torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))


def test_no_power_no_weight_no_veto() -> None:
    k = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert_none(nash_bargaining(k))
    a = nash_bargaining(k, power=torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(a.weights, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    assert_none(nash_bargaining(k, power=torch.zeros(3)))


def test_nobody_has_a_stake() -> None:
    experts = players(1, 50, seed=0).expand(7, 50).bfloat16()
    nothing = nash_bargaining(domain_gram(experts, experts[0]))
    assert_none(nothing)
    assert int(nothing.iterations) == 0
    assert_none(nash_bargaining(torch.zeros(1, 1)))


def test_all_players_equal_but_not_the_base() -> None:
    a = nash_bargaining(torch.full((7, 7), 4.0, dtype=torch.float64))
    torch.testing.assert_close(a.weights, torch.full((7,), 0.5 / 7**0.5, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 2, 5, 33, 128, 256])
def test_lengths_from_a_millionth_to_a_million(count: int) -> None:
    k = gram(count, seed=count)
    lengths = 10 ** uniform(count, count, -6, 6)
    k = lengths[:, None] * k * lengths
    assert_solves(nash_bargaining(k), k)


@pytest.mark.parametrize("spread", [1e-3, 1e-6])
def test_powers_far_apart(spread: float) -> None:
    k, p = gram(20, seed=2), torch.logspace(0, np.log10(spread), 20, dtype=torch.float64)
    assert_solves(nash_bargaining(k, power=p), k, p=p)


@pytest.mark.parametrize("count", [1, 4, 60])
def test_mean_disagreement_point(count: int) -> None:
    # Unit in which the mean squared length is 1: d = K 1/N is what the plain mean would give to each.
    vectors = players(count, 4 * count, seed=count, shift=0.1)
    k = vectors @ vectors.T
    k = k / k.diagonal().mean()
    d = k.mean(1)
    solution = nash_bargaining(k, d)
    assert_solves(solution, k, d)
    assert (k @ solution.weights > d).all()
    np.testing.assert_allclose(solution.weights.numpy(), by_scipy(k, d), rtol=1e-8)


# --- batches, dtypes, input ------------------------------------------------------------------------------------------


def test_batch_equals_loop() -> None:
    grams = torch.stack([gram(6, seed) for seed in range(6)]).reshape(2, 3, 6, 6)
    grams[0, 1] = 0
    grams[1, 0, :2, :2] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    grams[1, 0, :2, 2:] = grams[1, 0, 2:, :2] = 0
    grams[1, 2, 4] = grams[1, 2, :, 4] = 0
    d = torch.zeros(2, 3, 6, dtype=torch.float64)
    d[0, 2] = 1.0
    p = uniform(36, 1, 0.5, 2).reshape(2, 3, 6)
    batch = nash_bargaining(grams, d, p)
    assert batch.weights.shape == (2, 3, 6)
    assert batch.residual.shape == batch.iterations.shape == (2, 3)
    singles = [nash_bargaining(grams[i, j], d[i, j], p[i, j]) for i in range(2) for j in range(3)]
    assert batch.status == [one.status for one in singles]
    assert batch.status == [AGREEMENT, NO_AGREEMENT, AGREEMENT, NO_AGREEMENT, AGREEMENT, AGREEMENT]
    torch.testing.assert_close(
        batch.weights.reshape(6, 6), torch.stack([one.weights for one in singles]), rtol=1e-9, atol=0
    )
    assert batch.iterations.flatten().tolist() == [int(one.iterations) for one in singles]


def test_one_vector_for_all_games() -> None:
    grams = torch.stack([gram(4, seed) for seed in range(3)])
    p = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(nash_bargaining(grams, power=p).weights[2], nash_bargaining(grams[2], power=p).weights)


def test_empty_batch() -> None:
    empty = nash_bargaining(torch.zeros(0, 3, 3))
    assert empty.weights.shape == (0, 3)
    assert empty.status == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_of_lower_precision(dtype: torch.dtype) -> None:
    k = gram(16, seed=1, width=400).to(dtype)
    solution = nash_bargaining(k)
    assert solution.weights.dtype == torch.float64
    assert_solves(solution, (k.double() + k.double().T) / 2)
    assert not k.requires_grad


def test_gram_is_left_alone_and_gradients_are_cut() -> None:
    k = gram(5).requires_grad_()
    before = k.detach().clone()
    assert not nash_bargaining(k).weights.requires_grad
    assert torch.equal(k.detach(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_on_the_accelerator() -> None:
    k = gram(16)
    there = nash_bargaining(k.cuda())
    assert there.weights.device.type == "cuda"
    torch.testing.assert_close(there.weights.cpu(), nash_bargaining(k).weights, rtol=1e-10, atol=0)


EYE = torch.eye(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gram": torch.zeros(3)}, r"\[3\].*N, N"),
        ({"gram": torch.zeros(2, 3)}, r"\[2, 3\]"),
        ({"gram": torch.zeros(0, 0)}, "N >= 1"),
        ({"gram": torch.eye(3, dtype=torch.int64)}, "int64"),
        ({"gram": EYE * float("nan")}, "NaN"),
        ({"gram": EYE * float("inf")}, "infinite"),
        ({"gram": -EYE}, "negative diagonal"),
        ({"gram": torch.tensor([[1.0, 0.5], [0.2, 1.0]])}, "not symmetric"),
        ({"gram": torch.tensor([[0.0, 0.5], [0.5, 1.0]])}, "zero diagonal"),
        ({"gram": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "semidefinite"),
        ({"gram": EYE, "disagreement": torch.zeros(2)}, r"disagreement.*\[2\].*\[3\]"),
        ({"gram": EYE, "disagreement": torch.tensor([0.0, float("nan"), 0.0])}, "disagreement has 1"),
        ({"gram": EYE, "power": torch.ones(1, 3)}, r"power.*\[1, 3\]"),
        ({"gram": EYE, "power": torch.tensor([1.0, -0.1, 1.0])}, "power has a negative entry, -0.1"),
        ({"gram": EYE, "power": torch.ones(3, dtype=torch.bool)}, "bool"),
        ({"gram": EYE, "precision": torch.int8}, "int8"),
        ({"gram": EYE, "precision": "bfloat16"}, "floating torch.dtype"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nash_bargaining(**arguments)
