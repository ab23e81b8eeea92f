"""Orders of neurons against all orders there are."""

from itertools import permutations

import numpy as np
import pytest
import torch
from float64_reference import double
from hypothesis import given, settings
from hypothesis import strategies as st
from small_mixtures import WIDTH, draws, expert_at, neurons64, random_experts, random_tokens
from torch.nn.functional import silu

from namex_hf.merging.alignment import order_by_activations, order_by_weights, permuted
from namex_hf.merging.routing import answer

INPUTS = random_tokens(30, 0)
quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


def found_order(how: str, reference, expert) -> torch.Tensor:
    if how == "weights":
        return order_by_weights(reference, expert)
    return order_by_activations(reference, expert, INPUTS, silu)


def likeness(how: str, reference, expert) -> np.ndarray:
    """``[WIDTH, WIDTH]``: sums of three cosines, or correlations."""
    if how == "activations":
        both = np.hstack([neurons64(INPUTS, reference), neurons64(INPUTS, expert)])
        return np.corrcoef(both, rowvar=False)[:WIDTH, WIDTH:]
    total = np.zeros((WIDTH, WIDTH))
    for name in ("gate_proj", "up_proj", "down_proj"):
        one, other = (double(matrix[name].T if name == "down_proj" else matrix[name]) for matrix in (reference, expert))
        total += one @ other.T / np.outer(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
    return total


@quick
@given(st.sampled_from(["weights", "activations"]), seeds)
def test_best_of_all_orders(how: str, seed: int) -> None:
    """Of two unlike experts, whose matrices have lengths of their own."""
    experts = {n: m * 10.0**i for i, (n, m) in enumerate(random_experts(2, seed).items(), start=-1)}
    reference, expert = expert_at(experts, 0), expert_at(experts, 1)
    alike = likeness(how, reference, expert)
    wanted = max(permutations(range(WIDTH)), key=lambda order: alike[range(WIDTH), order].sum())
    assert found_order(how, reference, expert).tolist() == list(wanted)


@quick
@given(st.sampled_from(["weights", "activations"]), seeds)
def test_a_copy_comes_back_exactly(how: str, seed: int) -> None:
    original = expert_at(random_experts(1, seed), 0)
    copy = permuted(original, torch.randperm(WIDTH, generator=draws(seed)))
    back = permuted(copy, found_order(how, original, copy))
    assert all(torch.equal(back[name], original[name]) for name in original)


def test_another_order_is_the_same_function() -> None:
    expert, order = expert_at(random_experts(1, 0), 0), torch.tensor([3, 0, 4, 1, 2])
    other = permuted(expert, order)
    assert torch.equal(other["gate_proj"][0], expert["gate_proj"][3])
    assert not torch.equal(other["down_proj"], expert["down_proj"])
    torch.testing.assert_close(answer(INPUTS, other, silu), answer(INPUTS, expert, silu))


@pytest.mark.parametrize("how", ["weights", "activations"])
def test_a_dead_neuron(how: str) -> None:
    """It is like none; the others find their places, and it takes what is left."""
    original = {name: matrix.clone() for name, matrix in expert_at(random_experts(1, 0), 0).items()}
    for name, matrix in original.items():
        matrix[(slice(None), 2) if name == "down_proj" else 2] = 0
    copy = permuted(original, torch.tensor([3, 0, 4, 1, 2]))
    back = permuted(copy, found_order(how, original, copy))
    assert all(torch.equal(back[name], original[name]) for name in original)
