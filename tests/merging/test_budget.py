"""Dealing out experts: against every way there is to do it."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namex_hf.merging.budget import candidate_counts, interpolate_error, least_damage

curves = st.lists(st.lists(st.integers(0, 30).map(float), min_size=5, max_size=5), min_size=1, max_size=4)


@given(curves, st.data())
def test_no_way_to_spend_it_does_less_damage(damage: list[list[float]], data: st.DataObject) -> None:
    total = data.draw(st.integers(len(damage), 5 * len(damage)))
    counts = least_damage(damage, total)
    ways = [way for way in product(range(1, 6), repeat=len(damage)) if sum(way) == total]

    def cost(way: tuple[int, ...]) -> tuple[float, int]:
        return sum(curve[n - 1] for curve, n in zip(damage, way, strict=True)), sum(n * n for n in way)

    assert counts in ways
    assert cost(counts) == min(map(cost, ways))


def test_layers_alike_share_alike() -> None:
    assert least_damage([[4.0, 3.0, 2.0, 1.0]] * 3, 7) in {(2, 2, 3), (2, 3, 2), (3, 2, 2)}
    assert least_damage([[0.0] * 8] * 4, 16) == (4, 4, 4, 4)


@pytest.mark.parametrize("total", [1, 9])
def test_what_cannot_be_spent(total: int) -> None:
    with pytest.raises(ValueError, match=f"total is {total}; accepted: 2 to 8"):
        least_damage([[1.0] * 4] * 2, total)


@given(st.integers(2, 70), st.data())
def test_numbers_to_measure(experts: int, data: st.DataObject) -> None:
    mean = data.draw(st.integers(1, experts - 1))
    numbers = candidate_counts(experts, mean)
    assert {1, mean} <= set(numbers) <= set(range(1, experts))
    assert numbers == sorted(set(numbers))


def test_between_what_was_measured() -> None:
    assert interpolate_error({1: 8.0, 3: 4.0, 5: 1.0}, 7) == [8.0, 6.0, 4.0, 2.5, 1.0, 0.5, 0.0]
    assert interpolate_error({1: 5.0, 2: 1.0, 3: 2.0}, 4) == [5.0, 2.0, 2.0, 0.0]  # more experts never do more damage
