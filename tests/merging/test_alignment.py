"""Orders of neurons against all orders there are."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from namex_hf.merging import alignment
from namex_hf.merging.alignment import layer_orders, order_by_activations, order_by_weights, permuted
from namex_hf.merging.routing import TokenRouting, expert_output
from tests.helpers.mixtures import WIDTH, draws, expert_at, random_experts, random_routing, random_tokens, weights_of
from tests.helpers.reference import double, neurons64

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
    experts = weights_of({n: m * 10.0**i for i, (n, m) in enumerate(random_experts(2, seed).items(), start=-1)})
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
    torch.testing.assert_close(expert_output(INPUTS, other, silu), expert_output(INPUTS, expert, silu))


@pytest.mark.parametrize("how", ["weights", "activations"])
def test_a_dead_neuron(how: str) -> None:
    """It is like none; the others find their places, and it takes what is left."""
    original = expert_at(random_experts(1, 0), 0).map(torch.clone)
    for name, matrix in original.items():
        matrix[(slice(None), 2) if name == "down_proj" else 2] = 0
    copy = permuted(original, torch.tensor([3, 0, 4, 1, 2]))
    back = permuted(copy, found_order(how, original, copy))
    assert all(torch.equal(back[name], original[name]) for name in original)


# --- all experts of a layer -------------------------------------------------------------------------------------------


def most_used(expert: int, experts: int) -> TokenRouting:
    """Of `INPUTS`. That expert has the largest gate values; the one after it has more tokens."""
    other = (expert + 1) % experts
    index = torch.tensor([[expert], [other], [other]]).repeat(len(INPUTS) // 3, 1)
    return TokenRouting(index, torch.where(index == expert, 0.9, 0.3))


@pytest.mark.parametrize("how", ["weights", "activations"])
@pytest.mark.parametrize("first", [0, 2, 3])
def test_a_layer_in_the_order_of_its_most_used_expert(how: str, first: int) -> None:
    """Copies of one expert become alike in all their neurons, and as the one with the largest gate mass has them."""
    original = expert_at(random_experts(1, 0), 0)
    copies = [permuted(original, torch.randperm(WIDTH, generator=draws(seed))) for seed in range(4)]
    assert not any(torch.equal(copies[first]["up_proj"], copies[i]["up_proj"]) for i in range(4) if i != first)
    experts = weights_of({name: torch.stack([one[name] for one in copies]).bfloat16() for name in original})
    held = {name: matrices.clone() for name, matrices in experts.items()}
    orders = layer_orders(experts, how, INPUTS, most_used(first, 4), silu)
    assert (orders.shape, orders.dtype, orders.device.type) == ((4, WIDTH), torch.int64, "cpu")
    assert orders[first].tolist() == list(range(WIDTH))
    for number in range(4):
        back = permuted(expert_at(experts, number), orders[number])
        assert all(torch.equal(back[name], expert_at(experts, first)[name]) for name in original)
    assert all(torch.equal(held[name], experts[name]) for name in held)  # what is given is not changed


@quick
@given(st.sampled_from(["weights", "activations"]), seeds)
def test_every_expert_of_a_layer_stays_the_same_function(how: str, seed: int) -> None:
    """Each is brought as near to the reference as it comes, on its own."""
    experts, routing = random_experts(3, seed), random_routing(len(INPUTS), 3, 2, seed)
    orders = layer_orders(experts, how, INPUTS, routing, silu)
    gates = np.zeros(3)
    np.add.at(gates, routing.index.numpy().ravel(), double(routing.value).ravel())
    reference = expert_at(experts, int(gates.argmax()))
    for number, order in enumerate(orders):
        expert = expert_at(experts, number)
        assert sorted(order.tolist()) == list(range(WIDTH))
        assert order.tolist() == found_order(how, reference, expert).tolist()
        torch.testing.assert_close(
            expert_output(INPUTS, permuted(expert, order), silu), expert_output(INPUTS, expert, silu)
        )


def test_no_alignment_is_the_order_as_it_is() -> None:
    experts = random_experts(3, 0)
    orders = layer_orders(experts, "none", INPUTS, most_used(1, 3), silu)
    assert orders.tolist() == [list(range(WIDTH))] * 3
    unlike = layer_orders(experts, "weights", INPUTS, most_used(1, 3), silu)
    assert unlike.tolist() != orders.tolist()
    assert unlike.tolist() != layer_orders(experts, "activations", INPUTS, most_used(1, 3), silu).tolist()


def test_tokens_to_align_by_are_taken_from_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many-th of them, so that what was seen at the end counts too."""
    seen: list[torch.Tensor] = []

    def order(_reference: object, _expert: object, inputs: torch.Tensor, _activation: object) -> torch.Tensor:
        seen.append(inputs)
        return torch.arange(WIDTH)

    monkeypatch.setattr(alignment, "order_by_activations", order)
    for most, wanted in ((10, INPUTS[::3]), (100, INPUTS), (30, INPUTS)):
        monkeypatch.setattr(alignment, "ALIGNMENT_TOKENS", most)
        layer_orders(random_experts(2, 0), "activations", INPUTS, most_used(0, 2), silu)
        assert torch.equal(seen.pop(), wanted)


def test_experts_that_no_token_reached_are_aligned_too() -> None:
    experts, nothing = random_experts(3, 0), TokenRouting(torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1))
    orders = layer_orders(experts, "weights", INPUTS[:0], nothing, silu)
    for number in range(3):  # none is used most: the first it is
        assert orders[number].tolist() == order_by_weights(expert_at(experts, 0), expert_at(experts, number)).tolist()
