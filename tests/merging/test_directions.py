"""Second moments in few numbers, against eigenvalues of the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from namex_hf.merging.directions import LayerCurvature, Leading, Spans, layer_curvature, spans
from namex_hf.merging.experts import ExpertWeights
from namex_hf.merging.routing import TokenRouting
from tests.helpers.mixtures import HIDDEN, WIDTH, draws, expert_at, random_experts, random_tokens
from tests.helpers.reference import curvatures, double, gates64, neurons64

COLUMNS = 6
quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds, ranks = st.integers(0, 10**6), st.integers(1, COLUMNS - 1)
token_counts = st.integers(1, 9)  # fewer than directions, too


def moment(seed: int, tokens: int = 9, columns: int = COLUMNS, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Of inputs whose columns have sizes of their own, so that eigenvalues lie apart."""
    inputs = torch.randn(tokens, columns, generator=draws(seed), dtype=torch.float64) * 2.0 ** torch.arange(columns)
    return (inputs.T @ inputs).to(dtype)


def eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest first; what is rounding is 0."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.where(values > 1e-12 * values.max(initial=0), values, 0)
    return values[::-1], vectors[:, ::-1]


def flattened(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The leading eigenpairs, and in all other directions the mean of what is left."""
    values, vectors = eigen(matrix)
    values = np.concatenate([values[:rank], np.full(len(matrix) - rank, values[rank:].mean())])
    return vectors @ np.diag(values) @ vectors.T


def rebuilt(found: Spans) -> np.ndarray:
    return curvatures(double(found.floor), double(found.directions))


# --- one expert -------------------------------------------------------------------------------------------------------


@quick
@given(seeds, token_counts, ranks, st.floats(0.1, 50))
def test_leading_directions_are_the_largest_eigenpairs(seed: int, tokens: int, rank: int, mass: float) -> None:
    whole = moment(seed, tokens)
    found = Leading.of(whole, mass, rank)
    values, vectors = eigen(double(whole) / mass)
    size = values.sum()
    assert found.vectors.shape == (COLUMNS, rank)
    assert found.vectors.dtype == found.energy.dtype == torch.float64
    order = double(found.energy).argsort()[::-1]
    np.testing.assert_allclose(double(found.energy)[order], values[:rank], atol=1e-10 * size)
    np.testing.assert_allclose(double(found.vectors).T @ double(found.vectors), np.eye(rank), atol=1e-9)
    shown = min(rank, tokens)  # of the others any will do
    like = np.abs(np.sum(double(found.vectors)[:, order] * vectors[:, :rank], axis=0))
    np.testing.assert_allclose(like[:shown], 1, atol=1e-6)
    assert found.rest == pytest.approx(values[rank:].mean(), abs=1e-10 * size)
    assert found.rest >= 0
    assert found.energy.min() >= 0
    kept = float(found.energy.sum()) + (COLUMNS - rank) * found.rest
    assert kept == pytest.approx(np.trace(double(whole)) / mass, rel=1e-9)


@pytest.mark.parametrize(("whole", "mass"), [(torch.zeros(4, 4), 0.0), (torch.zeros(4, 4), 2.0), (moment(0), 0.0)])
def test_an_expert_that_hears_nothing(whole: torch.Tensor, mass: float) -> None:
    """No token, or none but zeros, or no mass."""
    found = Leading.of(whole, mass, 2)
    assert (found.vectors.shape, found.energy.shape) == ((len(whole), 2), (2,))
    assert not found.vectors.any()
    assert not found.energy.any()
    assert found.rest == 0


def test_float32_moments_and_wide_ones() -> None:
    """As calibration has them: float32, hundreds of columns, fewer tokens than that."""
    whole = torch.randn(40, 200, generator=draws(0)) * torch.linspace(0.1, 3, 200)
    whole[:, 0] += 100  # a direction far above the others, common to all tokens
    whole = whole.T @ whole
    found = Leading.of(whole, 3.0, 5)
    values, vectors = eigen(double(whole) / 3.0)
    order = found.energy.argsort(descending=True)
    np.testing.assert_allclose(double(found.energy[order]), values[:5], rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(double(found.vectors[:, order]) * vectors[:, :5], axis=0)), 1, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_the_same_on_every_run(tokens: int) -> None:
    """Bit for bit, whatever the state of the generators; also what is left to choose where tokens are few."""
    whole = torch.randint(-3, 4, (tokens, 16), generator=draws(tokens)).double()  # no rounding hides that they are
    whole = whole.T @ whole
    first = Leading.of(whole, 1.0, 4)
    for seed in range(3):
        torch.manual_seed(seed)
        again = Leading.of(whole, 1.0, 4)
        assert torch.equal(first.vectors, again.vectors)
        assert torch.equal(first.energy, again.energy)
        assert first.rest == again.rest


# --- experts on one scale ---------------------------------------------------------------------------------------------


def several(seed: int, tokens: list[int], rank: int) -> tuple[list[torch.Tensor], torch.Tensor, list[Leading]]:
    """Second moments of unlike size, their usage, and what is kept of them; an expert without tokens has no usage."""
    mass = torch.tensor([float(count > 0) for count in tokens], dtype=torch.float64)
    mass *= 0.1 + torch.rand(len(tokens), generator=draws(seed), dtype=torch.float64)
    moments = [10.0 ** (i % 3) * moment(seed + i, count) for i, count in enumerate(tokens)]
    leading = [Leading.of(m, own, rank) for m, own in zip(moments, mass.tolist(), strict=True)]
    per_mass = [m / own if own else 0 * m for m, own in zip(moments, mass.tolist(), strict=True)]
    return per_mass, mass / mass.sum(), leading


@quick
@given(
    seeds,
    st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    ranks,
    st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]),
)
def test_rebuilt_curvatures(seed: int, tokens: list[int], rank: int, ridge: float) -> None:
    """In a common unit: the moment with its small eigenvalues made equal, and the ridge in every direction."""
    moments, usage, leading = several(seed, tokens, rank)
    found = spans(leading, usage, ridge)
    assert (found.directions.shape, found.floor.shape) == ((len(tokens), COLUMNS, rank), (len(tokens),))
    assert (found.floor > 0).all()
    assert float(usage @ found.floor) == pytest.approx(1, rel=1e-12)
    mean = sum(float(p) * np.trace(double(m)) for p, m in zip(usage, moments, strict=True)) / COLUMNS
    wanted = [flattened(double(m), rank) + ridge * mean * np.eye(COLUMNS) for m in moments]
    floors = [one.rest + ridge * mean for one in leading]
    unit = float(double(usage) @ np.array(floors))
    np.testing.assert_allclose(double(found.floor), np.array(floors) / unit, rtol=1e-8)
    for one, full in zip(rebuilt(found), wanted, strict=True):
        np.testing.assert_allclose(one * unit, full, rtol=1e-6, atol=1e-9 * np.trace(full))
    for one, true in zip(rebuilt(found), moments, strict=True):  # the same trace, but for the ridge
        size = np.trace(double(true))
        assert np.trace(one) * unit == pytest.approx(size + ridge * mean * COLUMNS, rel=1e-8, abs=1e-9 * mean)
    along = sum(float(p * one.energy.sum()) for p, one in zip(usage, leading, strict=True))
    assert found.explained == pytest.approx(along / (mean * COLUMNS), rel=1e-9)
    assert 0 < found.explained <= 1 + 1e-12


def test_more_directions_come_nearer_to_the_whole() -> None:
    """With all but one it is the whole."""
    moments = [moment(seed) for seed in range(3)]
    usage = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    errors, explained = [], []
    for rank in range(1, COLUMNS):
        leading = [Leading.of(one, 1.0, rank) for one in moments]
        found = spans(leading, usage, 1e-12)
        unit = float(usage @ torch.tensor([one.rest for one in leading], dtype=torch.float64))
        errors.append(max(np.abs(one * unit - double(m)).max() for one, m in zip(rebuilt(found), moments, strict=True)))
        explained.append(found.explained)
    assert errors == sorted(errors, reverse=True)
    assert explained == sorted(explained)
    assert explained[0] < explained[-1] < 1
    assert errors[0] > 1e-3 * max(float(m.max()) for m in moments)
    assert errors[-1] < 1e-6 * max(float(m.max()) for m in moments)


def test_a_flat_moment_has_no_directions() -> None:
    """Energies that do not stand out leave nothing, not the root of a negative number."""
    flat = Leading(torch.eye(4, dtype=torch.float64)[:, :2], torch.tensor([1.0, 1 - 1e-12], dtype=torch.float64), 1.0)
    found = spans([flat], torch.ones(1, dtype=torch.float64), 1e-4)
    assert not found.directions.any()
    assert found.explained == pytest.approx(0.5)


def test_an_expert_without_tokens_has_a_ridge_alone() -> None:
    _, usage, leading = several(0, [9, 0, 9], 2)
    assert usage[1] == 0
    found = spans(leading, usage, 1e-3)
    assert not found.directions[1].any()
    assert all(found.directions[i].any() for i in (0, 2))
    whole = float(usage @ torch.stack([one.energy.sum() + (COLUMNS - 2) * one.rest for one in leading]))
    floors = [one.rest + 1e-3 * whole / COLUMNS for one in leading]
    assert float(found.floor[1] / found.floor[0]) == pytest.approx(floors[1] / floors[0])
    assert 0 < found.floor[1] < found.floor[0]


def test_no_expert_with_tokens_is_the_identity() -> None:
    nothing = [Leading.of(torch.zeros(COLUMNS, COLUMNS), 0.0, 2) for _ in range(3)]
    found = spans(nothing, torch.full((3,), 1 / 3, dtype=torch.float64), 1e-4)
    np.testing.assert_array_equal(rebuilt(found), [np.eye(COLUMNS)] * 3)
    assert found.directions.shape == (3, COLUMNS, 2)
    assert found.explained == 0


# --- a layer ----------------------------------------------------------------------------------------------------------


def some_routing(tokens: int, experts: tuple[int, ...], seed: int = 0) -> TokenRouting:
    """Two of those experts a token, with gate values from 0.1 to 1.1."""
    draw = draws(seed)
    places = torch.rand(tokens, len(experts), generator=draw).argsort(1)[:, :2]
    return TokenRouting(torch.tensor(experts)[places], 0.1 + torch.rand(tokens, 2, generator=draw))


def assert_layer(
    found: LayerCurvature,
    experts: ExpertWeights,
    inputs: torch.Tensor,
    routing: TokenRouting,
    rank: int,
    ridge: float,
) -> None:
    """Against all tokens at once in numpy."""
    count = len(experts["gate_proj"])
    gates = gates64(routing, count)
    mass = gates.sum(0)
    np.testing.assert_allclose(double(found.usage), mass / mass.sum(), rtol=1e-6)
    heard = [double(inputs)] * count, [neurons64(inputs, expert_at(experts, i)) for i in range(count)]
    for part, inputs_of in zip((found.inputs, found.neurons), heard, strict=True):
        weighed = [gates[:, [i]] * inputs_of[i] for i in range(count)]
        true = [w.T @ w / m if m else 0 * (w.T @ w) for w, m in zip(weighed, mass, strict=True)]
        mean = sum(m * np.trace(c) for m, c in zip(mass / mass.sum(), true, strict=True)) / len(true[0])
        full = np.stack([flattened(c, rank) + ridge * mean * np.eye(len(c)) for c in true])
        unit = sum(m * (eigen(c)[0][rank:].mean() + ridge * mean) for m, c in zip(mass / mass.sum(), true, strict=True))
        np.testing.assert_allclose(rebuilt(part), full / unit, rtol=1e-4, atol=1e-5 * np.abs(full / unit).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_layer(dtype: torch.dtype, rank: int) -> None:
    experts, inputs, routing = random_experts(4, 0, dtype), random_tokens(40, 0), some_routing(40, (0, 1, 2, 3))
    found = layer_curvature(experts, inputs, routing, silu, rank, 1e-3)
    assert found.inputs.directions.shape == (4, HIDDEN, rank)
    assert found.neurons.directions.shape == (4, WIDTH, rank)
    assert_layer(found, experts, inputs, routing, rank, 1e-3)
    again = layer_curvature(experts, inputs, routing, silu, rank, 1e-3).tensors()
    assert all(torch.equal(again[name], tensor) for name, tensor in found.tensors().items())


def test_a_layer_with_few_tokens_and_an_idle_expert() -> None:
    """Fewer tokens than directions; one of the experts has none."""
    experts, inputs, routing = random_experts(3, 1), random_tokens(2, 1), some_routing(2, (0, 2))
    found = layer_curvature(experts, inputs, routing, silu, 3, 1e-2)
    assert found.usage[1] == 0
    assert not found.inputs.directions[1].any()
    assert not found.neurons.directions[1].any()
    assert_layer(found, experts, inputs, routing, 3, 1e-2)


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_layer_that_hears_nothing(tokens: int) -> None:
    """No text, or experts that answer zeros alone."""
    experts = random_experts(3, 0).map(torch.zeros_like)
    inputs, routing = random_tokens(tokens, 0), some_routing(tokens, (0, 1, 2))
    found = layer_curvature(experts, inputs, routing, silu, 2, 1e-4)
    np.testing.assert_array_equal(rebuilt(found.neurons), [np.eye(WIDTH)] * 3)
    if not tokens:
        np.testing.assert_array_equal(rebuilt(found.inputs), [np.eye(HIDDEN)] * 3)
        assert found.usage.tolist() == [1 / 3] * 3
    assert float(found.usage.sum()) == pytest.approx(1)


def test_tensors_by_the_names_of_the_model() -> None:
    experts, inputs, routing = random_experts(3, 0), random_tokens(20, 0), some_routing(20, (0, 1, 2))
    found = layer_curvature(experts, inputs, routing, silu, 2, 1e-4)
    tensors = found.tensors()
    assert list(tensors) == ["usage", "input_floor", "input_directions", "neuron_floor", "neuron_directions"]
    assert tensors["usage"] is found.usage
    assert tensors["input_floor"] is found.inputs.floor
    assert tensors["input_directions"] is found.inputs.directions
    assert tensors["neuron_floor"] is found.neurons.floor
    assert tensors["neuron_directions"] is found.neurons.directions
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
