"""Paired statistics against scipy and against counting."""

from math import comb

import numpy as np
import pytest
from scipy import stats

from namex_hf.evaluation.statistics import mcnemar, paired


def test_mcnemar_is_the_binomial_tail() -> None:
    for higher, lower in ((0, 0), (1, 0), (5, 2), (30, 12), (7, 7)):
        count, few = higher + lower, min(higher, lower)
        tail = sum(comb(count, k) for k in range(few + 1)) / 2**count
        assert mcnemar(higher, lower) == pytest.approx(min(1.0, 2 * tail) if higher != lower else 1.0)


def test_right_or_wrong() -> None:
    draw = np.random.default_rng(0)
    old = draw.integers(0, 2, 300)
    new = np.where(draw.random(300) < 0.2, 1, old)
    found = paired(new.tolist(), old.tolist())
    assert found.test == "mcnemar"
    assert found.lower == 0
    assert found.higher == int((new > old).sum())
    assert found.mean == pytest.approx(new.mean() - old.mean())
    assert found.stderr == pytest.approx(stats.sem(new - old))
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.stderr, rel=0.15)
    assert not found.is_noise


def test_other_scores_take_the_paired_t_test() -> None:
    draw = np.random.default_rng(1)
    old = draw.normal(size=50)
    new = old + draw.normal(0.1, 0.5, size=50)
    found = paired(new.tolist(), old.tolist())
    assert found.test == "t"
    assert found.p == pytest.approx(stats.ttest_1samp(new - old, 0).pvalue)


def test_what_is_common_to_both_cancels() -> None:
    draw = np.random.default_rng(2)
    hard = draw.normal(0, 10, size=100)
    found = paired((hard + 0.1 + draw.normal(0, 0.01, 100)).tolist(), hard.tolist())
    assert not found.is_noise
    assert found.stderr < 0.01


def test_no_difference_at_all() -> None:
    found = paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.mean, found.low, found.high, found.p, found.is_noise) == (0, 0, 0, 1, True)
    assert paired([1.5, 2.5], [1.5, 2.5]).p == 1
    assert paired([1.75, 2.75], [1.5, 2.5]).p == 0  # the same on every item


def test_items_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="2 and 3 items; needed: the same, at least 2"):
        paired([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="1 and 1 items"):
        paired([0], [0])
