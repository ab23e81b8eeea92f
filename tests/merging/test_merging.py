"""What the merge promises whatever the experts: scale and order do not matter, groups partition, NaN is named."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from namex_hf.merging.combine import averages, merged_expert, play
from namex_hf.merging.experts import PROJECTIONS, ExpertWeights, NotFiniteError, games_of, grams, weighted_step
from namex_hf.merging.gate import Gate
from namex_hf.merging.grouping import groups_by_weights
from namex_hf.merging.mass import expected_mass
from namex_hf.merging.propagation import PropagationState, propagate
from namex_hf.recipe import Game, Grouped, GroupGame, Propagation, Residual
from tests.helpers.mixtures import expert_at, weights_of
from tests.helpers.reference import double, games, merged_group, nash

WIDTH, HIDDEN = 5, 6
GRANULARITIES = ("matrix", "expert")
settings.register_profile("merging", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("merging")


def layer(count: int, seed: int, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    """Random experts of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    size = 0.2 + torch.rand(count, 1, 1, generator=draw)
    return weights_of(
        {name: (size * torch.randn(count, *shapes[name], generator=draw)).to(dtype) for name in PROJECTIONS}
    )


def first(experts: ExpertWeights) -> ExpertWeights:
    return expert_at(experts, 0)


def a_base(seed: int) -> ExpertWeights:
    return first(layer(1, seed + 1000))


GAMES = st.builds(
    Game,
    disagreement=st.sampled_from(["zero", "mean"]),
    granularity=st.sampled_from(GRANULARITIES),
    scale=st.sampled_from(["simplex", "lemma"]),
)
GOING = st.builds(Propagation, gamma=st.floats(0.1, 2))
CHOICES = st.one_of(
    st.builds(Residual, game=GAMES, propagation=GOING),
    st.builds(Residual, method=st.just("ep-camex"), propagation=GOING),
)


@given(CHOICES, st.integers(2, 9), st.integers(0, 99), st.floats(1e-3, 1e3), st.booleans())
def test_scale_of_all_leaves_the_shares(choice: Residual, count: int, seed: int, scale: float, own: bool) -> None:
    """Experts and base times c: the same simplex weights; raw weights divided by c; the next base times c.

    (The raw solution is dimensional, so with scale 'lemma' the step itself stays as it is.)
    """
    experts = layer(count, seed)
    base = first(experts) if own else a_base(seed)
    larger = experts.map(lambda t: scale * t), base.map(lambda t: scale * t)
    one, other = (
        propagate(experts, PropagationState(base), choice, 0),
        propagate(larger[0], PropagationState(larger[1]), choice, 0),
    )
    raw = choice.game.scale == "lemma" and choice.weights_by == "nash"
    torch.testing.assert_close(other.state.weights * (scale if raw else 1), one.state.weights, rtol=1e-4, atol=1e-6)
    for name in PROJECTIONS:
        step, larger_step = one.state.base[name] - base[name], other.state.base[name] - larger[1][name]
        torch.testing.assert_close(larger_step / (1 if raw else scale), step, rtol=1e-3, atol=1e-4)


@given(CHOICES, st.integers(2, 9), st.integers(0, 99), st.randoms(use_true_random=False))
def test_order_of_experts(choice: Residual, count: int, seed: int, lot) -> None:
    """Experts in another order: weights in that order, the same step of the base, the same cosines."""
    experts, base, order = layer(count, seed), a_base(seed), list(range(count))
    lot.shuffle(order)
    one = propagate(experts, PropagationState(base), choice, 0)
    other = propagate(experts.map(lambda t: t[order]), PropagationState(base), choice, 0)
    torch.testing.assert_close(other.state.weights, one.state.weights[:, order], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(other.cosines, one.cosines[:, order][:, :, order], rtol=1e-5, atol=1e-6)
    for name in PROJECTIONS:
        torch.testing.assert_close(other.state.base[name], one.state.base[name], rtol=1e-4, atol=1e-5)


@given(st.integers(1, 9), st.integers(0, 99), st.sampled_from(GRANULARITIES), st.sampled_from(["zero", "mean"]))
def test_weights_are_the_bargain(count: int, seed: int, granularity: str, point: str) -> None:
    """Against the reference's solution of K a = 1/a + d, and each weight where it belongs."""
    experts, base = layer(count, seed), a_base(seed)
    found = propagate(
        experts,
        PropagationState(base),
        Residual(game=Game(granularity=granularity, disagreement=point, scale="lemma")),
        0,
    )
    for index, names in enumerate(games({"granularity": granularity})):
        tau = np.concatenate([double(experts[n] - base[n]).reshape(count, -1) for n in names], axis=1)
        wanted = nash(tau @ tau.T, point == "mean")
        np.testing.assert_allclose(found.state.weights[index].numpy(), wanted, rtol=1e-4)


@given(st.integers(2, 9), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_grams_add(count: int, seed: int, dtype: torch.dtype) -> None:
    """The Gram matrix of whole experts is the sum of their matrices', and is that of the domain vectors."""
    experts, base = layer(count, seed, dtype), a_base(seed)
    matrices, whole = grams(experts, base, "matrix"), grams(experts, base, "expert")
    assert matrices.shape == (3, count, count)
    torch.testing.assert_close(whole[0], matrices.sum(0), rtol=1e-12, atol=0)
    for index, name in enumerate(PROJECTIONS):
        tau = double(experts[name].float() - base[name]).reshape(count, -1)
        np.testing.assert_allclose(matrices[index].numpy(), tau @ tau.T, rtol=1e-4, atol=1e-5)
    assert [len(game) for game in games_of("matrix")] == [1, 1, 1]
    assert games_of("expert") == (PROJECTIONS,)


@given(st.integers(1, 9), st.integers(0, 99), st.integers(0, 8), st.booleans())
def test_weighted_step(count: int, seed: int, silent: int, one_alone: bool) -> None:
    """sum_i w_i (E_i - E_m), players of weight 0 or not; without weight, no step."""
    matrices, base = layer(count, seed)["up_proj"], a_base(seed)["up_proj"]
    weights = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights[[i for i in range(count) if i % 9 == silent or (one_alone and i > 0)]] = 0
    wanted = (weights[:, None, None] * (matrices.double() - base)).sum(0)
    torch.testing.assert_close(weighted_step(matrices, base, weights).double(), wanted, rtol=1e-5, atol=1e-6)
    assert not weighted_step(matrices, base, torch.zeros(count)).any()


def test_longer_than_a_chunk() -> None:
    """Matrices that are read in several chunks, the last one short: steps and Gram matrices are those of the whole."""
    draw = torch.Generator().manual_seed(0)
    matrices, base = torch.randn(5, 700, 601, generator=draw), torch.randn(700, 601, generator=draw)
    weights = torch.tensor([0.2, 0.3, 0.1, 0.0, 0.4], dtype=torch.float64)
    wanted = torch.einsum("i,irc->rc", weights, matrices.double() - base)
    torch.testing.assert_close(weighted_step(matrices, base, weights), wanted.float(), rtol=1e-4, atol=1e-5)
    tau = (matrices - base).double().flatten(1)
    experts = ExpertWeights(matrices, matrices, matrices)
    gram = grams(experts, ExpertWeights(base, base, base), "matrix")
    torch.testing.assert_close(gram[1], tau @ tau.T, rtol=1e-5, atol=1e-2)


@given(
    arrays.arrays(np.float64, st.tuples(st.integers(1, 12), st.just(3)), elements=st.sampled_from([0.0, 1, -1, 2])),
    st.data(),
)
def test_groups_partition(vectors: np.ndarray, data: st.DataObject) -> None:
    """Exactly K groups for every K: ties, copies and zero vectors included; each index once, in order."""
    count = data.draw(st.integers(1, len(vectors)))
    groups = groups_by_weights(torch.from_numpy(vectors @ vectors.T), count)
    assert len(groups) == count
    assert sorted(index for group in groups for index in group) == list(range(len(vectors)))
    assert all(list(group) == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


@pytest.mark.parametrize("count", range(1, 8))
def test_groups_of_copies(count: int) -> None:
    """Seven equal experts, at zero distance of each other, are cut into any number of groups."""
    gram = torch.ones(7, 7, dtype=torch.float64)
    groups = groups_by_weights(gram, count)
    assert len(groups) == count
    assert sorted(index for group in groups for index in group) == list(range(7))


def test_groups_follow_likeness() -> None:
    """Three bundles of like directions, whatever their lengths, come out as the three groups."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.eye(3, 40).repeat(4, 1) + 0.02 * torch.randn(12, 40, generator=draw)
    vectors = (directions * torch.linspace(0.1, 5, 12)[:, None]).double()
    assert groups_by_weights(vectors @ vectors.T, 3) == ((0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11))


@given(
    st.integers(2, 7),
    st.integers(0, 99),
    st.sampled_from(["nash", "uniform"]),
    st.sampled_from(["zero", "mean"]),
    st.sampled_from(GRANULARITIES),
    st.data(),
)
def test_merged_group(count: int, seed: int, weighting: str, point: str, granularity: str, data) -> None:
    """A group within a layer against the reference; shares are on the simplex, the first member's is 1/n."""
    experts = layer(count, seed)
    members = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=2)))
    game = {"disagreement": point, "granularity": granularity} if weighting == "nash" else {}
    choice = Grouped(experts=1, weighting=weighting, game=GroupGame(**game))
    group = play(experts, tuple(members), choice, "cpu")
    merged, records = merged_expert(experts, group, choice, "cpu"), group.record
    recipe = {"weighting": weighting, "disagreement": point, "granularity": granularity}
    wanted = merged_group({name: double(tensor) for name, tensor in experts.items()}, members, recipe)
    for name in PROJECTIONS:
        np.testing.assert_allclose(double(merged[name]), wanted[name], rtol=1e-4, atol=1e-5)
    for record in records:
        assert sum(record["weights"]) == pytest.approx(1)
        assert record["weights"][0] == pytest.approx(1 / len(members))
        assert min(record["weights"]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_group_of_one(dtype: torch.dtype) -> None:
    """It is its expert, bit for bit, and plays no game."""
    experts = layer(4, 0, dtype)
    choice = Grouped(experts=1)
    group = play(experts, (2,), choice, "cpu")
    merged = merged_expert(experts, group, choice, "cpu", factor=0.5)
    assert group.record == []
    for name in PROJECTIONS:  # of its own: the layer's memory is filled again while it waits to be written
        assert merged[name].untyped_storage().data_ptr() != experts[name].untyped_storage().data_ptr()
    assert all(torch.equal(merged[name], experts[name][2]) for name in PROJECTIONS)


def test_members_that_pull_apart_fall_back() -> None:
    """Two members on opposite sides of the first cannot agree: the plain mean, recorded as such."""
    experts = layer(3, 5)
    for name in PROJECTIONS:
        experts[name][2] = 2 * experts[name][0] - experts[name][1]
    choice = Grouped(experts=1, game=GroupGame(granularity="expert"))
    group = play(experts, (0, 1, 2), choice, "cpu")
    merged = merged_expert(experts, group, choice, "cpu")
    assert group.record[0]["status"] == "uniform_fallback"
    assert group.record[0]["weights"] == pytest.approx([1 / 3] * 3)
    for name in PROJECTIONS:
        torch.testing.assert_close(merged[name], experts[name].mean(0))


@given(st.integers(1, 9), st.integers(0, 99), st.sampled_from(PROJECTIONS), st.sampled_from(["nan", "inf", "-inf"]))
def test_not_finite_is_named(count: int, seed: int, name: str, value: str) -> None:
    """The expert and projection with NaN or infinity in it, not one that it has spoilt."""
    experts, expert = layer(count, seed), seed % count
    experts[name].view(count, -1)[expert, -1] = float(value)
    for choice in (Residual(), Residual(method="ep-camex"), Residual(game=Game(granularity="expert"))):
        with pytest.raises(NotFiniteError) as caught:
            propagate(experts, PropagationState(a_base(seed)), choice, 0)
        assert (caught.value.expert, caught.value.projection) == (expert, name)
        with pytest.raises(NotFiniteError) as caught:
            propagate(
                experts,
                PropagationState(a_base(seed), torch.full((3, count), 1 / count, dtype=torch.float64)),
                choice,
                1,
            )
        assert (caught.value.expert, caught.value.projection) == (expert, name)


def test_reused_weights_move_by_index() -> None:
    """Weights of an earlier layer are taken as they are, by expert index, and recorded as reused."""
    experts, base = layer(4, 1), a_base(1)
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3, dtype=torch.float64)
    step = propagate(experts, PropagationState(base, weights), Residual(propagation=Propagation(every=2, gamma=0.5)), 3)
    assert {game["status"] for game in step.record} == {"reused"}
    for name in PROJECTIONS:
        wanted = base[name] + 0.5 * (weights[0, :, None, None] * (experts[name] - base[name])).sum(0)
        torch.testing.assert_close(step.state.base[name], wanted.float())
    solved = propagate(experts, PropagationState(base, weights), Residual(propagation=Propagation(every=2)), 2)
    assert {game["status"] for game in solved.record} == {"agreement"}


def test_router_rows() -> None:
    """Means of the members' rows, in the router's dtype; a group of one keeps its row bit for bit."""
    router = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = averages(router, ((0, 3), (1,), (2, 4)))
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows[1], router[1])
    wanted = (router[[0, 2]].float() + router[[3, 4]].float()) / 2
    assert torch.equal(rows[[0, 2]], wanted.bfloat16())


@given(st.integers(2, 8), st.integers(0, 99))
def test_expected_mass(count: int, seed: int) -> None:
    """Rises with top-k to 1 where all experts are taken, repeats with the seed, and is k/N for a router of zeros."""
    router = 2 * torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))
    norm = torch.ones(HIDDEN)
    masses = [expected_mass(router, norm, Gate(top_k), seed) for top_k in range(1, count + 1)]
    assert masses == sorted(masses)
    assert masses[-1] == pytest.approx(1)
    assert masses[0] == expected_mass(router, norm, Gate(1), seed)
    assert expected_mass(0 * router, norm, Gate(1), seed) == pytest.approx(1 / count)
