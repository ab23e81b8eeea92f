"""Bootstrap intervals against the normal approximation and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from namex_hf.evaluation.statistics import mean_interval


def test_close_to_the_normal_approximation():
    draw = np.random.default_rng(3)
    groups = [draw.normal(1.0, 2.0, 400), draw.normal(5.0, 1.0, 100)]
    # Two groups of equal weight, whatever their sizes: the variance of a half of each mean.
    error = 0.5 * math.sqrt(sum(group.var() / len(group) for group in groups))
    middle = np.mean([group.mean() for group in groups])
    low, high = mean_interval(groups)
    assert low == pytest.approx(middle - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(middle + 1.96 * error, abs=0.1 * error)


def test_groups_are_resampled_apart():
    """What differs between groups alone is no uncertainty."""
    assert mean_interval([[1.0, 1.0, 1.0], [9.0, 9.0]]) == (5.0, 5.0)
    low, high = mean_interval([[0.0, 1.0] * 50])
    assert 0.3 < low < 0.45 < 0.55 < high < 0.7


def test_the_seed_decides():
    groups = [list(np.random.default_rng(0).normal(size=20))]
    assert mean_interval(groups) == mean_interval(groups)
    assert mean_interval(groups) != mean_interval(groups, seed=1)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.floats(-1e3, 1e3))
def test_moves_with_the_samples_and_stays_among_them(samples, shift):
    low, high = mean_interval([samples])
    assert min(samples) - 1e-9 <= low <= high <= max(samples) + 1e-9
    moved = mean_interval([[sample + shift for sample in samples]])
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_one_sample_says_nothing():
    with pytest.raises(ValueError, match="groups of 3, 1 samples; at least 2 are needed"):
        mean_interval([[1.0, 2.0, 3.0], [1.0]])
