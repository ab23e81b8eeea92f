"""Groups of experts: by damage against whole outputs rebuilt for every candidate pair, by distances against scipy."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from namex_hf.merging.grouping import average_linkage, groups_by_damage, groups_by_outputs, groups_by_router
from tests.helpers.mixtures import HIDDEN, random_experts, random_routing, random_tokens
from tests.helpers.reference import answers64, double, gates64

quick = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)
TOKENS = 24


def case(count: int, top_k: int, seed: int, used: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Answers ``[tokens, N, hidden]`` and gate values ``[tokens, N]``; only the first `used` experts have tokens."""
    answers = answers64(random_tokens(TOKENS, seed), random_experts(count, seed))
    return answers, gates64(random_routing(TOKENS, used or count, top_k, seed), count)


def by_damage(answers: np.ndarray, gates: np.ndarray, count: int) -> list[list[int]]:
    gram = torch.from_numpy(np.einsum("tih,tjh->tij", answers, answers))
    return [list(group) for group in groups_by_damage(gram, torch.from_numpy(gates), count)]


def error(answers: np.ndarray, gates: np.ndarray, groups: list[list[int]]) -> float:
    """Squared error of the layer's output where every group answers as one, by rebuilding that output."""
    missed = np.einsum("tn,tnh->th", gates, answers)
    for group in groups:
        energy = (gates[:, group] ** 2).sum(0)
        mean = np.average(answers[:, group], axis=1, weights=energy if energy.any() else None)
        missed -= gates[:, group].sum(1, keepdims=True) * mean
    return float((missed**2).sum())


def greedy(answers: np.ndarray, gates: np.ndarray, count: int) -> list[list[int]]:
    groups = [[index] for index in range(gates.shape[1])]

    def joined(pair: tuple[int, int]) -> list[list[int]]:
        return [*(g for i, g in enumerate(groups) if i not in pair), groups[pair[0]] + groups[pair[1]]]

    while len(groups) > count:
        pairs = combinations(range(len(groups)), 2)
        groups = min((joined(pair) for pair in pairs), key=lambda candidate: error(answers, gates, candidate))
    return sorted(sorted(group) for group in groups)


@quick
@given(st.integers(3, 7), st.integers(1, 3), seeds)
def test_damage_is_the_error_of_the_whole_output(experts: int, top_k: int, seed: int) -> None:
    """At every count, from N to 1."""
    answers, gates = case(experts, top_k, seed)
    for count in range(1, experts + 1):
        assert by_damage(answers, gates, count) == greedy(answers, gates, count)


@quick
@given(st.integers(1, 3), seeds)
def test_experts_without_tokens_go_first(spare: int, seed: int) -> None:
    """To join them costs nothing: groups with tokens stay single as long as there are others to join."""
    answers, gates = case(4 + spare, 2, seed, used=4)
    for count in range(4, 4 + spare + 1):
        groups = by_damage(answers, gates, count)
        assert len(groups) == count
        assert error(answers, gates, groups) < 1e-9 * error(answers, gates, [list(range(4)), [4]])
        assert all(sum(index < 4 for index in group) <= 1 for group in groups)
    assert error(answers, gates, by_damage(answers, gates, 3)) == pytest.approx(
        error(answers, gates, greedy(answers[:, :4], gates[:, :4], 3))
    )


def test_experts_that_speak_together_differ_less_than_their_distance() -> None:
    """Two that always speak with equal gate values are joined without loss, however unlike; a distance cannot know."""
    answers, gates = case(4, 2, 0)
    answers[:, 1], answers[:, 3] = -answers[:, 0], 1.01 * answers[:, 2]
    gates[:, 1] = gates[:, 0]
    assert by_damage(answers, gates, 3) == [[0, 1], [2], [3]]
    outputs = groups_by_outputs(torch.from_numpy(answers.mean(0)), 3)
    assert outputs == ((0,), (1,), (2, 3))


def test_no_tokens_at_all() -> None:
    answers, _ = case(5, 2, 0)
    groups = by_damage(answers, np.zeros((TOKENS, 5)), 2)
    assert sorted(index for group in groups for index in group) == list(range(5))
    assert len(groups) == 2


def test_damage_leaves_its_arguments_alone() -> None:
    answers, gates = case(5, 2, 0)
    gram = torch.from_numpy(np.einsum("tih,tjh->tij", answers, answers))
    given = gram.clone(), torch.from_numpy(gates)
    groups_by_damage(*given, 2)
    assert torch.equal(given[0], gram)
    assert np.array_equal(given[1].numpy(), case(5, 2, 0)[1])


# --- average linkage -------------------------------------------------------------------------------------------------


def partition(tree: np.ndarray, count: int) -> tuple[tuple[int, ...], ...]:
    labels = fcluster(tree, count, "maxclust")
    groups = {label: tuple(np.flatnonzero(labels == label).tolist()) for label in labels}
    return tuple(sorted(groups.values()))


@quick
@given(st.integers(2, 9), seeds, st.data())
def test_outputs_as_scipy(experts: int, seed: int, data: st.DataObject) -> None:
    """Average linkage of Euclidean distances (HC-SMoE)."""
    outputs = np.random.default_rng(seed).normal(size=(experts, HIDDEN))
    count = data.draw(st.integers(1, experts))
    wanted = partition(linkage(outputs, "average", metric="euclidean"), count)
    assert groups_by_outputs(torch.from_numpy(outputs), count) == wanted


@quick
@given(st.integers(2, 9), seeds, st.data())
def test_router_as_numpy(experts: int, seed: int, data: st.DataObject) -> None:
    """Average linkage of 1 - correlation."""
    gates = gates64(random_routing(200, experts, min(2, experts), seed), experts)
    count = data.draw(st.integers(1, experts))
    far = 1 - np.corrcoef(gates, rowvar=False)
    wanted = partition(linkage(far[np.triu_indices(experts, 1)], "average"), count)
    assert groups_by_router(torch.from_numpy(gates).float(), count) == wanted


def test_an_expert_that_never_speaks_correlates_with_none() -> None:
    gates = np.abs(np.random.default_rng(0).normal(size=(100, 5)))
    gates[:, 3], gates[:, 1] = 0, 2 * gates[:, 0]
    assert groups_by_router(torch.from_numpy(gates), 4) == ((0, 1), (2,), (3,), (4,))


def test_distances_with_rounding() -> None:
    """Not quite symmetric, not quite 0 on the diagonal, below 0 for two that are equal: read as they are meant.

    They are left as they are.
    """
    points = double(random_tokens(6, 0))
    far = np.linalg.norm(points[:, None] - points[None], axis=-1)
    rounded = far + 1e-9 * np.random.default_rng(0).normal(size=far.shape)
    rounded[2, 3] = rounded[3, 2] = -1e-9
    given = torch.from_numpy(rounded.copy())
    for count in range(1, 6):
        far[2, 3] = far[3, 2] = 0
        assert average_linkage(given, count) == partition(linkage(far[np.triu_indices(6, 1)], "average"), count)
    assert np.array_equal(given.numpy(), rounded)
