"""A pretrained router in other forms: by angle, and by token id."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from namex_hf.merging.gate import Gate
from namex_hf.merging.routers import (
    SHARPEST,
    assignment,
    comparison,
    cosine_form,
    cosines,
    load_entropy,
    mean_entropy,
    overlap,
    scale_by_entropy,
    scale_by_norms,
)
from namex_hf.merging.routing import TokenRouting, route
from tests.helpers.mixtures import draws
from tests.helpers.reference import double, softmax64

SIZES = [(7, 16), (16, 7), (5, 5), (1, 4), (60, 64)]  # experts, hidden


def router_of(experts: int, hidden: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different length, as pretrained ones have."""
    draw = draws(seed)
    return torch.randn(experts, hidden, generator=draw) * (0.2 + 2 * torch.rand(experts, 1, generator=draw))


def inputs_of(tokens: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=draws(500 + seed))


# By angle.


@pytest.mark.parametrize(("experts", "hidden"), SIZES)
def test_without_the_norms_it_is_the_linear_router(experts: int, hidden: int) -> None:
    """P h . e_i = W_i h, the rows of P are orthonormal, and nothing else of h is seen."""
    router, inputs = router_of(experts, hidden), inputs_of(40, hidden)
    projection, embeddings = cosine_form(router)
    rank = min(experts, hidden)
    assert (projection.shape, embeddings.shape) == ((rank, hidden), (experts, rank))
    assert projection.dtype == embeddings.dtype == torch.float32
    p, e = double(projection), double(embeddings)
    assert p @ p.T == pytest.approx(np.eye(rank), abs=1e-6)
    wanted = double(inputs) @ double(router).T
    assert double(inputs) @ p.T @ e.T == pytest.approx(wanted, abs=2e-6 * float(np.abs(wanted).max()))
    assert np.linalg.norm(e, axis=1) == pytest.approx(np.linalg.norm(double(router), axis=1), rel=1e-6)


@pytest.mark.parametrize(("experts", "hidden"), SIZES)
def test_cosines_are_those_of_the_routers_rows_with_what_it_sees(experts: int, hidden: int) -> None:
    """By least squares in float64: the part of h in the span of W's rows, at an angle to each of them."""
    router, inputs = router_of(experts, hidden, 1), inputs_of(40, hidden, 1)
    w, h = double(router), double(inputs)
    seen = h @ np.linalg.pinv(w) @ w
    lengths = np.linalg.norm(seen, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    found = cosines(inputs, *cosine_form(router))
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(h @ w.T / lengths, abs=3e-6)
    assert float(found.abs().max()) <= 1 + 1e-6


def test_directions_that_the_router_has_not() -> None:
    """Rows in a plane, one of them zero: still W h, and no NaN where an embedding or an input is zero."""
    plane, draw = torch.randn(2, 12, generator=draws(3)), draws(4)
    router = torch.cat([torch.randn(5, 2, generator=draw) @ plane, torch.zeros(1, 12)])
    projection, embeddings = cosine_form(router)
    inputs = torch.cat([inputs_of(20, 12), torch.zeros(1, 12)])
    wanted = double(inputs) @ double(router).T
    assert double(inputs @ projection.T @ embeddings.T) == pytest.approx(wanted, abs=1e-5)
    found = cosines(inputs, projection, embeddings)
    assert found.isfinite().all()
    assert found[-1].tolist() == [0] * 6
    assert found[:, -1].abs().max() <= 1


def test_a_router_in_lower_precision() -> None:
    """It is taken as it is stored."""
    router = router_of(7, 16).bfloat16()
    for one, other in zip(cosine_form(router), cosine_form(router.float()), strict=True):
        assert torch.equal(one, other)


# How sharp.


@pytest.mark.parametrize(("experts", "hidden"), [(7, 16), (16, 64), (64, 16)])
def test_the_scale_by_norms_is_the_size_of_logits_on_average(experts: int, hidden: int) -> None:
    """mean |W_i| times the root mean square of |P h|, for inputs of any direction that went through the norm."""
    router, norm = router_of(experts, hidden, 2), 1 + 0.5 * torch.randn(hidden, generator=draws(6))
    lot = np.random.default_rng(0)
    directions = lot.standard_normal((100_000, hidden))
    directions *= np.sqrt(hidden) / np.linalg.norm(directions, axis=1, keepdims=True)  # as an RMS norm leaves them
    seen = directions * double(norm) @ np.linalg.svd(double(router), full_matrices=False)[2].T
    length = np.linalg.norm(double(router), axis=1).mean()
    assert scale_by_norms(router, norm) == pytest.approx(length * np.sqrt((seen**2).sum(1).mean()), rel=5e-3)
    mean = length * np.linalg.norm(seen, axis=1).mean()  # E|P h|, which the root mean square stands for
    assert scale_by_norms(router, norm) == pytest.approx(mean, rel=0.06)


def test_the_scale_by_norms_follows_router_and_norm() -> None:
    router, norm = router_of(7, 16), torch.rand(16, generator=draws(1))
    known = scale_by_norms(router, norm)
    assert scale_by_norms(3 * router, norm) == pytest.approx(3 * known, rel=1e-5)
    assert scale_by_norms(router, -2 * norm) == pytest.approx(2 * known, rel=1e-5)
    assert scale_by_norms(router.bfloat16(), norm.bfloat16()) == pytest.approx(known, rel=1e-2)
    # Experts more than directions: all of h is seen.
    wide = router_of(32, 16)
    wanted = double(wide.norm(dim=1)).mean() * np.linalg.norm(double(norm))
    assert scale_by_norms(wide, norm) == pytest.approx(wanted, rel=1e-5)


LOGITS = st.integers(1, 9).flatmap(
    lambda experts: st.lists(
        st.lists(st.floats(-30, 30, width=32), min_size=experts, max_size=experts), min_size=1, max_size=6
    )
)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.01, 20))
def test_mean_entropy_is_scipys(rows: list[list[float]], scale: float) -> None:
    wanted = entropy(softmax64(scale * np.array(rows)), axis=1).mean()
    assert mean_entropy(torch.tensor(rows), scale) == pytest.approx(wanted, abs=2e-5)


def test_mean_entropy_in_the_limits() -> None:
    assert mean_entropy(torch.zeros(5, 8)) == pytest.approx(math.log(8))
    assert mean_entropy(torch.tensor([[0.0, -1e4, -1e4]])) == 0
    assert mean_entropy(torch.randn(5, 1)) == 0
    assert mean_entropy(torch.randn(5, 8), 0.0) == pytest.approx(math.log(8))


def entropy64(scores: torch.Tensor) -> float:
    return float(entropy(softmax64(double(scores)), axis=1).mean())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(2, 20), st.floats(0.05, 8), st.integers(0, 999))
def test_as_decided_as_the_linear_router(experts: int, hidden: int, size: float, seed: int) -> None:
    """Mean entropies are equal wherever some scale makes them so, by scipy; twice as sharp is sharper."""
    router, inputs = size * router_of(experts, hidden, seed), inputs_of(64, hidden, seed)
    logits, angles = inputs @ router.T, cosines(inputs, *cosine_form(router))
    scale, wanted = scale_by_entropy(logits, angles), entropy64(logits)
    assert 0 < scale <= 1.01 * math.exp(SHARPEST)
    if entropy64(angles * math.exp(SHARPEST)) <= wanted - 1e-3:
        assert entropy64(angles.double() * scale) == pytest.approx(wanted, abs=2e-6)
        assert entropy64(angles.double() * 2 * scale) < wanted
        assert entropy64(angles.double() * scale / 2) > wanted


def test_the_scale_grows_with_that_of_the_linear_router() -> None:
    router, inputs = router_of(7, 16), inputs_of(200, 16)
    angles = cosines(inputs, *cosine_form(router))
    scales = [scale_by_entropy(size * inputs @ router.T, angles) for size in (0.01, 0.1, 0.5, 1, 2, 4)]
    assert scales == sorted(scales)
    assert all(one < 0.75 * other for one, other in pairwise(scales))
    # Logits that are scaled cosines already give their scale back.
    assert scale_by_entropy(7.5 * angles, angles) == pytest.approx(7.5, rel=1e-4)


def test_routers_without_an_answer() -> None:
    """A uniform one (any scale is too sharp), a single expert (no scale changes it), one sharper than any scale."""
    angles = cosines(inputs_of(50, 8), *cosine_form(router_of(5, 8)))
    uniform = scale_by_entropy(torch.zeros(50, 5), angles)
    assert 0 < uniform < 1e-2
    assert entropy64(angles * uniform) == pytest.approx(math.log(5), abs=1e-5)
    alone = scale_by_entropy(torch.randn(50, 1, generator=draws(0)), torch.ones(50, 1))
    assert 0 < alone < math.inf
    same = torch.full((50, 5), 0.5)  # experts of one direction: nothing tells them apart
    assert scale_by_entropy(torch.eye(5).repeat(10, 1), same) == pytest.approx(math.exp(SHARPEST))
    sharp = scale_by_entropy(1e6 * torch.eye(5).repeat(10, 1), angles)
    assert 100 < sharp <= math.exp(SHARPEST) * (1 + 1e-9)
    assert mean_entropy(angles, sharp) < 1e-3


# By token id.


def assigned_by_loops(ids: list[int], routing: TokenRouting, experts: int, vocabulary: int) -> list[list[int]]:
    """Most tokens first, then most gate mass."""
    top_k = routing.index.shape[1]
    table = []
    for one in range(vocabulary):
        counts, mass = [0] * experts, [0.0] * experts
        for token, own in enumerate(ids):
            if own == one:
                for expert, value in zip(routing.index[token].tolist(), routing.value[token].tolist(), strict=True):
                    counts[expert] += 1
                    mass[expert] += value
        order = sorted(range(experts), key=lambda expert: (-counts[expert], -mass[expert]))
        table.append(order[:top_k] if any(counts) else [-1] * top_k)
    return table


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_assignment_is_a_count(data: st.DataObject) -> None:
    """Against loops; ids that few tokens have, so that counts tie and gate values decide."""
    experts, tokens = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 60))
    top_k, seed = data.draw(st.integers(1, experts)), data.draw(st.integers(0, 10_000))
    used = data.draw(st.integers(1, 12))
    vocabulary, draw = used + data.draw(st.integers(0, 5)), draws(seed)
    ids = torch.randint(0, used, (tokens,), generator=draw)
    logits = torch.randn(tokens, experts, generator=draw) + 2 * torch.randn(used, experts, generator=draw)[ids]
    value, index = logits.softmax(-1).topk(top_k)
    table = assignment(ids, TokenRouting(index, value), experts, vocabulary)
    assert table.dtype == torch.int32
    assert table.shape == (vocabulary, top_k)
    wanted = assigned_by_loops(ids.tolist(), TokenRouting(index, value), experts, vocabulary)
    # Where an id has chosen fewer experts than top-k, never: every token chooses top-k different ones.
    assert table.tolist() == wanted
    assert [one for one in range(vocabulary) if table[one, 0] < 0] == [
        one for one in range(vocabulary) if one not in ids.tolist()
    ]
    assert all(len(set(row)) == top_k for row in table.tolist() if row[0] >= 0)


def test_gate_values_decide_between_equal_counts_alone() -> None:
    """However large they are: two tokens with all of the gate against three with a trace of it."""
    ids = torch.tensor([4] * 5 + [2] * 2)
    index = torch.tensor([[0], [1], [0], [1], [0], [3], [1]])
    value = torch.tensor([[0.01], [1.0], [0.01], [1.0], [0.01], [0.30], [0.31]])
    table = assignment(ids, TokenRouting(index, value), 4, 6)
    assert table.tolist() == [[-1], [-1], [1], [-1], [0], [-1]]


def test_an_assignment_by_falling_count() -> None:
    index = torch.tensor([[5, 1], [5, 2], [2, 5], [2, 3], [5, 3], [1, 5]])
    table = assignment(torch.full((6,), 1), TokenRouting(index, torch.full((6, 2), 0.25)), 6, 3)
    assert table.tolist() == [[-1, -1], [5, 2], [-1, -1]]


def test_counts_are_what_distillation_ends_at() -> None:
    """A student with a free logit for every id and expert, by gradient descent on StableMoE's cross-entropy.

    Against each chosen expert with weight 1/k, as the docstring has it; its top-k are the table's on every id whose
    counts have no tie at the edge, and its softmax is each expert's share of the id's choices.
    """
    experts, top_k, vocabulary, tokens, draw = 6, 2, 12, 400, draws(8)
    ids = torch.randint(0, vocabulary - 1, (tokens,), generator=draw)
    logits = torch.randn(tokens, experts, generator=draw) + 2 * torch.randn(vocabulary, experts, generator=draw)[ids]
    value, index = logits.softmax(-1).topk(top_k)
    student = torch.zeros(vocabulary, experts, requires_grad=True)
    descent = torch.optim.Adam([student], lr=0.1)
    for _ in range(600):
        loss = -student.log_softmax(-1)[ids].gather(1, index).sum(1).mean() / top_k
        descent.zero_grad()
        loss.backward()
        descent.step()
    counts = torch.zeros(vocabulary, experts)
    counts.index_put_((ids[:, None].expand(-1, top_k), index), torch.ones(tokens, top_k), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    seen = counts.sum(1) > 0
    assert int(seen.sum()) == vocabulary - 1
    torch.testing.assert_close(student.detach().softmax(-1)[seen], shares[seen], atol=0.01, rtol=0)
    table, compared = assignment(ids, TokenRouting(index, value), experts, vocabulary), 0
    for one in seen.nonzero().flatten().tolist():
        falling = counts[one].sort(descending=True).values
        if falling[top_k - 1] > falling[top_k]:
            best = student.detach()[one].topk(top_k).indices
            assert set(best.tolist()) == set(table[one].tolist())
            if falling[0] > falling[1]:
                assert best.tolist() == table[one].tolist()
            compared += 1
    assert compared >= 6
    assert table[vocabulary - 1].tolist() == [-1, -1]


def test_an_assignment_of_a_real_router() -> None:
    """Tokens of one id hear the same: the table is the router's own choice, in the order of its values."""
    router, words = router_of(7, 16), inputs_of(5, 16)
    ids = torch.tensor([0, 3, 3, 4, 1, 0, 3])
    routing = route(words[ids], router, Gate(3))
    table = assignment(ids, routing, 7, 6)
    chosen = (words @ router.T).topk(3).indices
    for one in range(6):
        assert table[one].tolist() == (chosen[one].tolist() if one in (0, 1, 3, 4) else [-1, -1, -1])


# How two routings differ.

CHOICES = st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(0, 999)).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.integers(1, sizes[0]))
)


def choices_of(experts: int, tokens: int, top_k: int, seed: int) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=draws(seed)).argsort(1)[:, :top_k]


@settings(max_examples=40, deadline=None)
@given(CHOICES)
def test_comparison_by_loops(drawn: tuple[tuple[int, int, int], int]) -> None:
    (experts, tokens, seed), top_k = drawn
    linear, chosen = choices_of(experts, tokens, top_k, seed), choices_of(experts, tokens, top_k, seed + 1)
    shares = [len({*one} & {*other}) / top_k for one, other in zip(linear.tolist(), chosen.tolist(), strict=True)]
    assert overlap(linear, chosen).tolist() == pytest.approx(shares)
    record = comparison(linear, chosen, experts)
    assert record.keys() == {"agreement", "agreement_first", "load_entropy_linear", "load_entropy"}
    assert record["agreement"] == pytest.approx(sum(shares) / tokens, abs=1e-6)
    first = [one[0] == other[0] for one, other in zip(linear.tolist(), chosen.tolist(), strict=True)]
    assert record["agreement_first"] == pytest.approx(sum(first) / tokens, abs=1e-6)
    for name, index in (("load_entropy_linear", linear), ("load_entropy", chosen)):
        counts = np.bincount(index.flatten().numpy(), minlength=experts)
        wanted = entropy(counts) / np.log(experts) if experts > 1 else 1
        assert record[name] == load_entropy(index, experts) == pytest.approx(wanted, abs=1e-9)
        assert 0 <= record[name] <= 1 + 1e-12
    assert all(type(value) is float for value in record.values())


@settings(max_examples=20, deadline=None)
@given(CHOICES)
def test_a_routing_agrees_with_itself_in_any_order(drawn: tuple[tuple[int, int, int], int]) -> None:
    (experts, tokens, seed), top_k = drawn
    index = choices_of(experts, tokens, top_k, seed)
    assert overlap(index, index.flip(1)).tolist() == [1] * tokens
    record = comparison(index, index.flip(1), experts)
    assert record["agreement"] == 1
    assert record["agreement_first"] == (1 if top_k == 1 else 0)
    assert record["load_entropy"] == record["load_entropy_linear"]


def test_load_in_the_limits() -> None:
    assert load_entropy(torch.arange(8)[:, None], 8) == pytest.approx(1)
    assert load_entropy(torch.full((9, 1), 3), 8) == 0
    assert load_entropy(torch.tensor([[0, 1], [1, 0]]), 8) == pytest.approx(math.log(2) / math.log(8))
    assert load_entropy(torch.zeros(3, 1, dtype=torch.long), 1) == 1
