"""The arithmetic of the table, against numpy."""

import math

import numpy as np
import pytest

from namex_hf.evaluation.grid import Cell, grid
from namex_hf.evaluation.rows import COSTS, Row, mean_row, perplexities, row_of, with_means
from tests.helpers.measurements import WINDOWS, result


def by_numpy(samples: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean of the groups' means, and the percentile bootstrap's ends, each group resampled by itself."""
    draw = np.random.default_rng(7)
    drawn = [group[draw.integers(0, len(group), (20000, len(group)))].mean(1) for group in samples]
    low, high = np.percentile(np.mean(drawn, 0), [2.5, 97.5])
    return float(np.mean([group.mean() for group in samples])), float(low), float(high)


def test_ratios_their_mean_and_its_interval():
    original, changed = result(0, experts=16), result(1, 0.2)
    row = row_of("x", changed, original)
    differences = [np.subtract(changed["losses"][name], original["losses"][name]) for name in WINDOWS]
    for name, values in zip(WINDOWS, differences, strict=True):
        ratio = math.exp(np.mean(changed["losses"][name])) / math.exp(np.mean(original["losses"][name]))
        assert row.ratios[name] == pytest.approx(ratio, rel=1e-12)
        assert row.ratios[name] == pytest.approx(math.exp(values.mean()), rel=1e-12)
    mean, low, high = by_numpy(differences)
    assert row.ratio == pytest.approx(math.exp(mean), rel=1e-12)
    assert row.ratio == pytest.approx(math.sqrt(row.ratios["code"] * row.ratios["prose"]), rel=1e-12)
    assert row.interval == pytest.approx((math.exp(low), math.exp(high)), rel=1e-3)
    assert row.interval[1] / row.interval[0] < 1.05  # what both find hard cancels: alone, losses would give 1.4
    worst = max(row.ratios, key=lambda name: row.ratios[name])
    assert row.worst == (worst, row.ratios[worst])


def test_exact_answers_and_the_paired_difference():
    original, changed = result(0), result(1, 0.2)
    row = row_of("x", changed, original)
    before, after = (np.array(one["right"], dtype=float) for one in (original, changed))
    mean, low, high = by_numpy([after - before])
    assert row.exact == pytest.approx(after.mean())
    assert row.difference == pytest.approx(mean)
    assert row.difference_interval == pytest.approx((low, high), abs=0.02)


def test_answers_are_paired_with_the_original_s_problem_by_problem():
    original, changed = result(0), result(1, 0.2)
    row = row_of("x", changed, original)
    assert row_of("original", original, original).answers["packaged"]["tokens"].difference is None
    for name, found in row.answers["packaged"].items():
        after, before = (np.array(one["answers"]["packaged"][name], dtype=float) for one in (changed, original))
        assert found.value == pytest.approx(after.mean())
        assert found.difference == pytest.approx((after - before).mean())
        assert found.stderr == pytest.approx((after - before).std(ddof=1) / math.sqrt(len(after)))
    rows = [row_of("x", result(seed), original) for seed in (1, 2)]
    lengths = [one.answers["packaged"]["tokens"] for one in rows]
    mean = mean_row(rows, "m", "m").answers["packaged"]["tokens"]
    assert mean.value == pytest.approx(np.mean([one.value for one in lengths]))
    assert mean.difference == pytest.approx(np.mean([one.difference for one in lengths]))
    assert mean.stderr is None


def test_closeness_is_a_mean_over_domains_and_its_error_is_over_windows():
    changed = result(1, 0.2)
    row = row_of("x", changed, {**result(0), "closeness": None})
    assert row.closeness is not None
    for name, at in (("acceptance", 1.0), ("divergence", 0.0)):
        windows = [np.array(values) for values in changed["closeness"][name].values()]
        error = np.sqrt(sum(each.var(ddof=1) / len(each) for each in windows)) / len(windows)
        found = row.closeness[name]
        assert found.value == pytest.approx(np.mean([each.mean() for each in windows]))
        assert (found.difference, found.stderr) == (pytest.approx(found.value - at), pytest.approx(error))
    rows = [row_of("x", result(seed), result(0)) for seed in (1, 2, 3)]
    mean, values = mean_row(rows, "m", "m"), [one.closeness["acceptance"].value for one in rows]
    assert mean.closeness["acceptance"].value == pytest.approx(np.mean(values))
    assert mean.spread["acceptance"] == pytest.approx(np.std(values, ddof=1))


def test_the_original_is_one_and_has_no_interval():
    original = result(0)
    row = row_of("original", original, original)
    assert set(row.ratios.values()) == {1.0}
    assert (row.ratio, row.interval, row.difference, row.difference_interval) == (1.0, None, None, None)
    found = perplexities(original)
    assert found["code"] == pytest.approx(math.exp(np.mean(original["losses"]["code"])))
    assert found["mean"] == pytest.approx(math.sqrt(found["code"] * found["prose"]))


def test_one_window_or_one_problem_gives_no_interval():
    few = {"code": 1, "prose": 5}
    original, changed = result(0, windows=few), result(1, windows=few)
    for one in (original, changed):
        one["right"] = one["right"][:1]
    row = row_of("x", changed, original)
    assert row.interval is None
    assert row.difference is not None
    assert row.difference_interval is None


def test_no_problems_no_answers():
    original, changed = ({**result(seed), "right": None} for seed in (0, 1))
    row = row_of("x", changed, original)
    assert (row.exact, row.difference, row.difference_interval) == (None, None, None)
    assert "exact" not in (mean_row([row, row], "m", "m").spread or {})


def test_a_mean_over_seeds_and_its_spread():
    original = result(0)
    rows = [row_of(str(seed), result(seed, 0.1 * seed), original) for seed in (1, 2, 3)]
    mean = mean_row(rows, "m", "m")
    assert mean.seeds == 3
    assert mean.interval is None
    assert mean.spread is not None
    for name in WINDOWS:
        values = [row.ratios[name] for row in rows]
        assert (mean.ratios[name], mean.spread[name]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    values = [row.ratio for row in rows]
    assert (mean.ratio, mean.spread["ratio"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    values = [row.exact for row in rows]
    assert (mean.exact, mean.spread["exact"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert mean.costs == dict.fromkeys(COSTS, pytest.approx(12.0))


def test_a_cost_that_is_not_known_of_all_has_no_mean():
    original = result(0)
    rows = [row_of("a", result(1), original), row_of("b", {**result(2), "seconds": None}, original)]
    assert mean_row(rows, "m", "m").costs["seconds"] is None


def pairs(cells: list[Cell]) -> list[tuple[Cell, Row]]:
    original = result(0)
    return [
        (
            cell,
            row_of(cell.label, result(cell.recipe.seed, experts=cell.recipe.to_dict()["experts"] or 0), original, cell),
        )
        for cell in cells
    ]


def test_rows_by_falling_experts_and_means_behind_their_seeds():
    cells = grid({}, {"merge": ["grouped"], "method": ["namex-full", "ep-camex"], "experts": [4, 8], "seed": [0, 1]})
    found = with_means(pairs(cells))
    titles = [
        f"default, method {method}, {what}"
        for method in ("namex-full", "ep-camex")
        for what in ("seed 0", "seed 1", "mean of 2 seeds")
    ]
    assert [(row.experts, row.title) for row in found] == [(experts, title) for experts in (8, 4) for title in titles]
    assert len({row.label for row in found}) == len(found)
    assert {row.line for row in found} == {"default, method namex-full", "default, method ep-camex"}


def test_one_seed_has_no_mean():
    found = with_means(pairs(grid({}, {"merge": ["grouped"], "experts": [4, 8], "seed": [1]})))
    assert [row.seeds for row in found] == [None, None]
