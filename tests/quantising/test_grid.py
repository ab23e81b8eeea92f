"""Grids and rounding, against every number that a grid holds."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from namex_hf.quantising.grid import Grid, best_grid, group_size, rounded_to_nearest, stored_bits

seeds, bits_of_a_level = st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8])


def random(seed: int, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift


def numbers_of(grid: Grid) -> torch.Tensor:
    """All numbers of each group's grid, ``[groups, levels]``."""
    return (torch.arange(2**grid.bits)[None] - grid.zero) * grid.scale


@pytest.mark.parametrize(("columns", "size"), [(128, 32), (80, 16), (40, 40), (48, 16), (7, 7)])
def test_groups_divide_a_row(columns: int, size: int):
    assert group_size(columns) == size


def test_bits_of_a_matrix_by_hand():
    assert stored_bits(2, 64, 4) == 2 * 64 * 4 + 2 * 2 * 16 + 2 * 2 * 4
    assert stored_bits(3, 40, 3) == 3 * (40 * 3 + 16 + 3)


@settings(max_examples=40, deadline=None)
@given(seeds, bits_of_a_level, st.sampled_from([1e-6, 0.02, 300.0]), st.sampled_from([0.0, 3.0, -3.0]))
def test_rounding_takes_the_nearest_number_of_the_group(seed: int, bits: int, scale: float, shift: float):
    values = random(seed, 5, 16, scale=scale, shift=shift * scale)
    grid = best_grid(values, bits)
    held = numbers_of(grid)
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert torch.equal(grid.zero, grid.zero.round().clamp(0, 2**bits - 1))
    rounded = grid.nearest(values)
    assert (rounded[:, :, None] == held[:, None]).any(2).all()
    error, least = (rounded - values).abs(), (values[:, :, None] - held[:, None]).abs().amin(2)
    assert torch.allclose(error, least, rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=40, deadline=None)
@given(seeds, bits_of_a_level)
def test_no_worse_than_the_grid_of_the_whole_range(seed: int, bits: int):
    values = random(seed, 6, 32)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float()
    whole = Grid(scale, (-low / scale).round().clamp(0, 2**bits - 1), bits)
    error = (best_grid(values, bits).nearest(values) - values).square().sum(1)
    assert (error <= (whole.nearest(values) - values).square().sum(1)).all()


def test_a_narrower_range_is_found_where_it_pays():
    values = torch.tensor([[-10.0, *[0.01 * n for n in range(31)]]])
    outlier = values.clone()
    outlier[0, 1:] = random(0, 31)
    grid = best_grid(outlier, 2)
    assert float(grid.scale * 3) < float(outlier.max() - outlier.min()) * 0.95


@pytest.mark.parametrize("value", [0.0, 1e-12, -2.5, 4.0])
def test_a_group_of_one_value(value: float):
    rounded = rounded_to_nearest(torch.full((3, 32), value), 3)
    assert rounded.isfinite().all()
    assert torch.allclose(rounded, torch.full((3, 32), value), atol=max(2.0**-24, abs(value) / 1000))


def test_every_group_of_a_row_has_its_own_grid():
    matrix = torch.cat([random(1, 4, 32), 100 * random(2, 4, 32)], 1)
    whole = rounded_to_nearest(matrix, 4)
    for start in (0, 32):
        part = matrix[:, start : start + 32]
        assert torch.equal(whole[:, start : start + 32], rounded_to_nearest(part, 4))


def test_more_bits_are_nearer():
    matrix = random(3, 16, 64)
    errors = [float((rounded_to_nearest(matrix, bits) - matrix).square().sum()) for bits in (2, 3, 4, 8)]
    assert all(more > 2 * fewer for more, fewer in itertools.pairwise(errors))
