"""GPTQ against the recursion of the optimal brain quantiser in float64, and against rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from namex_hf.quantising.gptq import RIDGE, gptq, output_error
from namex_hf.quantising.grid import best_grid, group_size, rounded_to_nearest

seeds, bits_of_a_level = st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8])


def problem(seed: int, rows: int, columns: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and second moments of inputs that go together, float32."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    return torch.randn(rows, columns, generator=draw), inputs.T @ inputs


def by_recursion(matrix: torch.Tensor, moment: torch.Tensor, bits: int) -> torch.Tensor:
    """Optimal brain quantiser, inputs in order: after each the row moves along H^-1, which loses that input."""
    columns = len(moment)
    hessian = moment.double() + RIDGE * moment.double().diagonal().mean() * torch.eye(columns)
    inverse, rest = torch.linalg.inv(hessian), matrix.double().clone()
    for column in range(columns):
        if column % group_size(columns) == 0:
            grid = best_grid(rest[:, column : column + group_size(columns)].float(), bits)
        rounded = grid.nearest(rest[:, column, None].float())[:, 0].double()
        step = (rounded - rest[:, column]) / inverse[column, column]
        rest += step[:, None] * inverse[column]
        rest[:, column] = rounded
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column].clone()
        inverse[column] = inverse[:, column] = 0
    return rest


def by_least_squares(matrix: torch.Tensor, moment: torch.Tensor, result: torch.Tensor, known: int) -> torch.Tensor:
    """The best rest of each row once its first ``known`` inputs are what they are, solved for directly."""
    change = (result - matrix).double()[:, :known]
    hessian = moment.double() + RIDGE * moment.double().diagonal().mean() * torch.eye(len(moment))
    return matrix[:, known:].double() - change @ hessian[:known, known:] @ torch.linalg.inv(hessian[known:, known:])


@pytest.mark.parametrize("columns", [5, 16, 48, 64, 40])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_as_the_recursion_has_it(columns: int, bits: int):
    matrix, moment = problem(columns + bits, 24, columns, 200)
    found, expected = gptq(matrix, moment, bits), by_recursion(matrix, moment, bits).float()
    plain = rounded_to_nearest(matrix, bits)
    change = [output_error((one - matrix).double(), moment.double()) for one in (expected, plain)]
    compensated = change[0] <= change[1]
    assert compensated.float().mean() > 0.5
    # A number half-way between two levels may go either way in float32, and the rest of its row with it.
    same = [torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True)]
    assert sum(same[row] for row in compensated.nonzero().flatten()) >= int(compensated.sum()) - 1
    assert torch.equal(found[~compensated], plain[~compensated])


def test_the_recursion_leaves_the_best_rest():
    """The reference itself: what is left of a row is the least-squares answer to what was rounded."""
    matrix, moment = problem(1, 6, 32, 100)
    result = by_recursion(matrix, moment, 3)
    best = by_least_squares(matrix, moment, result, 31)
    grid = best_grid(matrix, 3)
    assert torch.allclose(grid.nearest(best.float()).double(), result[:, 31:], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seeds, bits_of_a_level, st.sampled_from([8, 32, 48]), st.sampled_from([0, 1, 7, 300]))
def test_never_worse_than_rounding_on_its_own_objective(seed: int, bits: int, columns: int, tokens: int):
    matrix, moment = problem(seed, 6, columns, tokens)
    sums = moment.double()
    errors = [
        output_error((one - matrix).double(), sums)
        for one in (gptq(matrix, moment, bits), rounded_to_nearest(matrix, bits))
    ]
    assert (errors[0] <= errors[1]).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_far_better_than_rounding_where_inputs_go_together(bits: int):
    matrix, moment = problem(0, 64, 64, 400)
    found, plain = (
        float(output_error(one - matrix, moment).sum())
        for one in (gptq(matrix, moment, bits), rounded_to_nearest(matrix, bits))
    )
    assert found < 0.7 * plain


@settings(max_examples=20, deadline=None)
@given(seeds, bits_of_a_level)
def test_independent_inputs_leave_nothing_to_make_up_for(seed: int, bits: int):
    matrix, _ = problem(seed, 5, 64, 1)
    assert torch.equal(gptq(matrix, 3 * torch.eye(64), bits), rounded_to_nearest(matrix, bits))


def test_without_tokens_it_rounds():
    matrix, _ = problem(4, 5, 32, 1)
    assert torch.equal(gptq(matrix, torch.zeros(32, 32), 3), rounded_to_nearest(matrix, 3))


def test_the_errors_of_outputs_by_their_definition():
    draw = torch.Generator().manual_seed(0)
    inputs, change = torch.randn(50, 12, generator=draw), torch.randn(4, 12, generator=draw)
    expected = (inputs @ change.T).square().sum(0)
    assert torch.allclose(output_error(change, inputs.T @ inputs), expected, rtol=1e-4)
