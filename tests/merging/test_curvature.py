"""Calibrated means against least squares over all tokens, row by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from namex_hf.merging.curvature import CurvedSum, second_moment, with_ridge
from tests.helpers.mixtures import draws
from tests.helpers.reference import double

ROWS, COLUMNS = 4, 5
quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds, counts, ridges = st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([1e-4, 1e-2, 1.0])
token_counts = st.lists(st.integers(1, 9), min_size=4, max_size=4)  # fewer than columns, too: what is left is ridge


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


def gates(seed: int, count: int) -> torch.Tensor:
    return 0.2 + torch.rand(count, generator=draws(seed), dtype=torch.float64)


def merged(matrices, moments, weights, ridge: float, diagonal: bool = False) -> torch.Tensor:
    total = CurvedSum(diagonal, ridge)
    for matrix, moment, weight in zip(matrices, moments, weights, strict=True):
        total.add(weight, matrix, moment)
    return total.solve()


@quick
@given(seeds, counts, token_counts, ridges)
def test_least_squares(seed: int, count: int, tokens: list[int], ridge: float) -> None:
    """No W has a smaller sum_i w_i (sum_t g_t^2 |(W - E_i) x_t|^2 + ridge mean(diag C_i) |W - E_i|^2)."""
    matrices = drawn(seed, count, ROWS, COLUMNS)
    weights = (0.1 + torch.rand(count, generator=draws(seed + 1))).tolist()
    moments, left, right = [], [], []
    for i in range(count):
        inputs, gate = drawn(seed + 2 + i, tokens[i], COLUMNS) * 10.0 ** (i - 1), gates(seed + 20 + i, tokens[i])
        moments.append(second_moment(inputs, gate))
        heavy = double(inputs * gate[:, None])
        rows = np.vstack([heavy, np.sqrt(ridge * (heavy**2).sum() / COLUMNS) * np.eye(COLUMNS)]) * weights[i] ** 0.5
        left.append(rows)
        right.append(rows @ double(matrices[i]).T)
    wanted = np.linalg.lstsq(np.vstack(left), np.vstack(right), rcond=None)[0].T
    np.testing.assert_allclose(merged(matrices, moments, weights, ridge).numpy(), wanted, rtol=1e-6, atol=1e-7)


@quick
@given(seeds, counts, ridges)
def test_diagonal_is_a_weighted_mean_of_every_column(seed: int, count: int, ridge: float) -> None:
    matrices, inputs = drawn(seed, count, ROWS, COLUMNS), drawn(seed + 1, count, 7, COLUMNS)
    weights = gates(seed + 2, count).tolist()
    found = merged(matrices, [second_moment(x, torch.ones(7)) for x in inputs], weights, ridge, diagonal=True)
    for column in range(COLUMNS):
        energy = double(inputs[:, :, column].square().sum(1) + ridge * inputs.square().sum((1, 2)) / COLUMNS)
        wanted = np.average(double(matrices[:, :, column]), axis=0, weights=energy * weights)
        np.testing.assert_allclose(found[:, column].numpy(), wanted, rtol=1e-10)


def test_second_moment() -> None:
    inputs, gate = drawn(0, 6, COLUMNS), gates(1, 6)
    wanted = sum(float(g) ** 2 * np.outer(x, x) for g, x in zip(gate, double(inputs), strict=True))
    np.testing.assert_allclose(second_moment(inputs, gate).numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_experts_are_left_alone(diagonal: bool, dtype: torch.dtype) -> None:
    matrix = drawn(0, ROWS, COLUMNS).to(dtype)
    moments = [second_moment(drawn(i, 3, COLUMNS).to(dtype), gates(i, 3).to(dtype)) for i in range(3)]
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(
        merged([matrix] * 3, moments, [0.2, 0.3, 0.5], 1e-4, diagonal).to(dtype), matrix, **close
    )


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unused_experts(diagonal: bool, dtype: torch.dtype) -> None:
    """Beside one that tokens have reached they do not matter; among themselves they have their plain weights."""
    matrices, none = drawn(0, 3, ROWS, COLUMNS).to(dtype), torch.zeros(COLUMNS, COLUMNS, dtype=dtype)
    used = second_moment(drawn(1, 9, COLUMNS), torch.ones(9)).to(dtype)
    beside = merged(matrices, [none, used, none], [1 / 3] * 3, 1e-4, diagonal)
    torch.testing.assert_close(beside.to(dtype), matrices[1])
    alone = merged(matrices, [none] * 3, [0.5, 0.3, 0.2], 1e-4, diagonal)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    torch.testing.assert_close(alone, torch.einsum("i,irc->rc", weights, matrices.double()), rtol=1e-6, atol=1e-6)


@quick
@given(seeds, st.floats(-3, 3))
def test_unit_of_all_moments_does_not_matter(seed: int, power: float) -> None:
    matrices, inputs = drawn(seed, 3, ROWS, COLUMNS), drawn(seed + 1, 3, 4, COLUMNS)
    moments = [second_moment(x, torch.ones(4)) for x in inputs]
    one = merged(matrices, moments, [1.0] * 3, 1e-2)
    torch.testing.assert_close(merged(matrices, [10**power * c for c in moments], [2.0] * 3, 1e-2), one)


def test_ridge_of_a_moment_and_of_its_diagonal() -> None:
    moment = second_moment(drawn(0, 2, COLUMNS), torch.ones(2))
    wanted = double(moment) + 0.1 * np.trace(double(moment)) / COLUMNS * np.eye(COLUMNS)
    np.testing.assert_allclose(with_ridge(moment, 0.1).numpy(), wanted, rtol=1e-12)
    np.testing.assert_allclose(with_ridge(moment.diagonal(), 0.1).numpy(), wanted.diagonal(), rtol=1e-12)
