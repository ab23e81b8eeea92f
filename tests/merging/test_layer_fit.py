"""The fit of a whole layer: its error, gradient and steps are those of float64, and the best that it met is left."""

import math
import weakref
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from namex_hf.merging import layer_fit
from namex_hf.merging.experts import ExpertWeights
from namex_hf.merging.gate import Gate
from namex_hf.merging.layer_fit import Descent, FitParameters, LayerFit, Problem, fit_layer
from namex_hf.merging.settings import FitSettings
from tests.helpers.checkpoints import PROJECTIONS
from tests.helpers.mixtures import HIDDEN, WIDTH, draws, random_experts, random_tokens, weights_of
from tests.helpers.reference import answers64, double, shared64

EXPERTS, TOP_K, TOKENS = 4, 2, 320
INPUTS = random_tokens(TOKENS, 0)
HELD_OUT = torch.arange(TOKENS) % 4 == 0
WEIGHT = 0.5 + torch.rand(TOKENS, generator=draws(7))

Parts = dict[str, torch.Tensor]
Layer = tuple[ExpertWeights, torch.Tensor, Parts]

ALONE, GATELESS, GATED = ("alone", "gateless", "gated")
"""What is beside the routed experts: nothing, a shared expert, one behind a gate."""
beside = pytest.mark.parametrize("shared", [ALONE, GATELESS, GATED])


def shared_of(kind: str, seed: int) -> Parts:
    """A shared expert as wide as a routed one."""
    parts = {name: tensor[0] for name, tensor in random_experts(1, 200 + seed).items()} if kind != ALONE else {}
    gate = {"gate": torch.randn(1, HIDDEN, generator=draws(300 + seed))} if kind == GATED else {}
    return parts | gate


def layer(seed: int, dtype: torch.dtype = torch.float32, experts: int = EXPERTS, shared: str = ALONE) -> Layer:
    """Experts, router and shared expert."""
    router = torch.randn(experts, HIDDEN, generator=draws(100 + seed)).to(dtype)
    parts = {name: tensor.to(dtype) for name, tensor in shared_of(shared, seed).items()}
    return random_experts(experts, seed, dtype), router, parts


def near(seed: int, far: float, dtype: torch.dtype = torch.float32, shared: str = ALONE) -> Layer:
    """A layer beside layer 0."""

    def between(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> Parts:
        return {name: (one[name] + far * other[name]).to(dtype) for name in one}

    one, other = layer(0, shared=shared), layer(seed, shared=shared)
    return weights_of(between(one[0], other[0])), (one[1] + far * other[1]).to(dtype), between(one[2], other[2])


def cast(of: Layer, dtype: torch.dtype | None = None) -> Layer:
    """A copy."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype or tensor.dtype, copy=True)

    return of[0].map(one), one(of[1]), {n: one(t) for n, t in of[2].items()}


def parts_of(of: Layer) -> list[torch.Tensor]:
    """Every matrix, the router's rows, and the shared expert's."""
    return [matrix for name in PROJECTIONS for matrix in of[0][name]] + [of[1], *of[2].values()]


def same(one: Layer, other: Layer) -> bool:
    return all(torch.equal(*pair) for pair in zip(parts_of(one), parts_of(other), strict=True))


def gates64(router: torch.Tensor, renormalises: bool = False, top_k: int = TOP_K) -> np.ndarray:
    """Softmax, and nothing beyond the top-k: ``[tokens, K]``."""
    logits = double(INPUTS) @ double(router).T
    gates = np.exp(logits - logits.max(1, keepdims=True))
    gates /= gates.sum(1, keepdims=True)
    gates[gates < np.sort(gates, axis=1)[:, -top_k, None]] = 0
    return gates / gates.sum(1, keepdims=True) if renormalises else gates


def output64(of: Layer, renormalises: bool = False, top_k: int = TOP_K) -> np.ndarray:
    routed = np.einsum("tk,tkh->th", gates64(of[1], renormalises, top_k), answers64(INPUTS, of[0]))
    return routed + (shared64(INPUTS, of[2]) if of[2] else 0)


def error64(of: Layer, wanted: torch.Tensor, tokens: torch.Tensor = HELD_OUT, **routed) -> float:
    """Weighted squares, relative to those of the output wanted."""
    heavy = double(WEIGHT)[:, None]
    missed, whole = ((heavy * part)[tokens] ** 2 for part in (output64(of, **routed) - double(wanted), double(wanted)))
    return float(missed.sum() / whole.sum())


def noisy() -> torch.Tensor:
    """An output that no layer fits exactly."""
    return torch.from_numpy(output64(layer(0))).float() + 2 * torch.randn(TOKENS, HIDDEN, generator=draws(5))


def problem(
    wanted: torch.Tensor,
    held_out: torch.Tensor = HELD_OUT,
    renormalises: bool = False,
    top_k: int = TOP_K,
    **settings: float,
) -> Problem:
    return Problem(INPUTS, wanted, WEIGHT, held_out, Gate(top_k, renormalises), silu, FitSettings(**settings))


def fit(of: Layer, aim: Problem, steps: int, seed: int = 0) -> LayerFit:
    """As the merge calls it."""
    with torch.no_grad():
        return fit_layer(aim, *of, steps, seed)


# --- error and gradient ----------------------------------------------------------------------------------------------


@beside
@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("batch", [1, 70, FitSettings.batch])
def test_errors(batch: int, renormalises: bool, shared: str) -> None:
    """Those of whole outputs, on any tokens, however many at a time."""
    wanted, start = noisy(), layer(2, shared=shared)
    aim, trained = problem(wanted, renormalises=renormalises, batch=batch), FitParameters.of(*start, INPUTS)
    for tokens in (torch.arange(TOKENS), HELD_OUT.nonzero()[:, 0], torch.tensor([5])):
        expected = error64(start, wanted, tokens, renormalises=renormalises)
        assert aim.error(tokens, trained) == pytest.approx(expected, rel=1e-4)


def loss64(leaves: list[torch.Tensor], wanted: torch.Tensor, tokens: torch.Tensor, renormalises: bool) -> torch.Tensor:
    """The loss of a batch in float64, every expert asked about every token; leaves as `parts_of` has them."""
    x, y, w = (part[tokens].double() for part in (INPUTS, wanted, WEIGHT))
    gate, up, down = (torch.stack(leaves[k * EXPERTS : (k + 1) * EXPERTS]) for k in range(3))
    router, *shared = leaves[3 * EXPERTS :]
    shares = torch.softmax(x @ router.T, -1)
    shares = shares * (shares >= shares.sort(-1).values[:, -TOP_K, None])
    if renormalises:
        shares = shares / shares.sum(-1, keepdim=True)
    before = torch.einsum("th,kwh->tkw", x, gate)
    heard = before / (1 + (-before).exp()) * torch.einsum("th,kwh->tkw", x, up)
    missed = torch.einsum("tk,tkw,khw->th", shares, heard, down) - y
    if shared:
        before = x @ shared[0].T
        given = (before / (1 + (-before).exp()) * (x @ shared[1].T)) @ shared[2].T
        missed = missed + (given / (1 + (-x @ shared[3].T).exp()) if len(shared) == 4 else given)
    return (w[:, None] * missed).square().sum() / (w[:, None] * y).square().sum()


def leaves64(of: Layer) -> list[torch.Tensor]:
    return [part.double().clone().requires_grad_() for part in parts_of(of)]


@beside
@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(renormalises: bool, dtype: torch.dtype, shared: str) -> None:
    """Of every matrix and of the rows."""
    wanted, start, tokens = noisy(), layer(2, dtype, shared=shared), torch.arange(3, 200)
    aim, trained, leaves = problem(wanted, renormalises=renormalises), FitParameters.of(*start, INPUTS), leaves64(start)
    loss, expected = aim.missed(tokens, trained) / aim.energy(tokens), loss64(leaves, wanted, tokens, renormalises)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    expected.backward()
    assert len(trained.parameters()) == len(leaves)
    for found, leaf in zip(trained.parameters(), leaves, strict=True):
        assert found.dtype == torch.float32
        assert found.grad is not None
        assert leaf.grad is not None
        size = float(leaf.grad.abs().max())
        assert size > 0
        torch.testing.assert_close(found.grad.double(), leaf.grad, rtol=1e-3, atol=1e-4 * size)


def adafactor64(of: Layer, wanted: torch.Tensor, steps: int) -> list[np.ndarray]:
    """What is left after some steps on all fitted tokens at once: Shazeer & Stern 2018 in numpy, factored second
    moments, updates clipped at 1 and scaled by the matrix, a first moment of 0.9; 20 steps up, half a cosine."""
    leaves, rows, columns, first = leaves64(of), {}, {}, {}
    for step in range(1, steps + 1):
        loss64(leaves, wanted, (~HELD_OUT).nonzero()[:, 0], False).backward()
        rate = 0.05 * min(1, step / 20) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        fade = 1 - step**-0.8
        for place, leaf in enumerate(leaves):
            assert leaf.grad is not None
            slope, matrix = leaf.grad.numpy(), leaf.detach().numpy()
            square = slope**2 + 1e-30
            rows[place] = fade * rows.get(place, 0) + (1 - fade) * square.mean(1)
            columns[place] = fade * columns.get(place, 0) + (1 - fade) * square.mean(0)
            update = slope / np.sqrt(np.outer(rows[place], columns[place]) / rows[place].mean())
            update /= max(1, np.sqrt((update**2).mean()))
            update *= rate * max(1e-3, np.sqrt((matrix**2).mean()))
            first[place] = 0.9 * first.get(place, 0) + 0.1 * update
            matrix -= first[place]  # the leaf's own memory
            leaf.grad = None
    return [leaf.detach().numpy() for leaf in leaves]


@pytest.mark.parametrize(("steps", "shared"), [(1, GATED), (30, ALONE), (30, GATED)])
def test_steps(steps: int, shared: str) -> None:
    """Those of the reference, from the first through the warm-up to where the cosine ends."""
    start, wanted = layer(2, shared=shared), noisy()
    left = cast(start)
    assert fit(left, problem(wanted), steps).steps == steps
    for one, other, begun in zip(parts_of(left), adafactor64(start, wanted, steps), parts_of(start), strict=True):
        moved = np.abs(double(begun) - other).max()
        np.testing.assert_allclose(double(one), other, rtol=0, atol=0.01 * moved)


# --- what is left ----------------------------------------------------------------------------------------------------


@beside
@pytest.mark.parametrize("renormalises", [False, True])
def test_a_planted_layer_is_found(renormalises: bool, shared: str) -> None:
    """Nearly exactly, also on tokens that were held out, where every matrix and row was moved."""
    wanted = torch.from_numpy(output64(layer(0, shared=shared), renormalises)).float()
    left = near(3, 0.3, shared=shared)
    found = fit(left, problem(wanted, renormalises=renormalises), 400)
    assert found.before > 0.2
    assert found.after < 0.02 * found.before
    assert found.after == pytest.approx(error64(left, wanted, renormalises=renormalises), rel=1e-2)


def checked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Errors as they are measured, the start's first."""
    seen, error = [], Problem.error

    def spy(self: Problem, tokens: torch.Tensor, trained: FitParameters) -> float:
        seen.append(error(self, tokens, trained))
        return seen[-1]

    monkeypatch.setattr(Problem, "error", spy)
    return seen


def test_the_best_of_all_checks_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long fit to few tokens gets worse on all others, and ends when it has for a quarter of its steps."""
    seen, wanted, most = checked(monkeypatch), noisy(), torch.arange(TOKENS) >= 12
    left = near(3, 0.5)
    found = fit(left, problem(wanted, most, check_every=5, rate=0.2), 200)
    best = int(np.argmin(seen))
    assert found.before == seen[0]
    assert found.after == seen[best] < 0.95 * seen[0]
    assert found.steps == 5 * best
    assert found.after == pytest.approx(error64(left, wanted, most), rel=1e-3)
    assert found.steps + 50 <= found.tried <= found.steps + 55 < 200
    assert len(seen) == 1 + found.tried // 5
    assert seen[-1] > 1.02 * found.after


def test_no_fit_ends_before_its_first_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a short fit would be over before anything is known of it."""
    seen, left = checked(monkeypatch), near(3, 0.5)
    found = fit(left, problem(noisy(), check_every=20), 45)
    assert (found.tried, len(seen)) == (45, 4)


@beside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_that_is_best_stays(dtype: torch.dtype, shared: str) -> None:
    """Bit for bit, with no step kept, and no more steps tried than it takes to know."""
    start = layer(0, dtype, shared=shared)
    left = cast(start)
    found = fit(left, problem(torch.from_numpy(output64(start)).float()), 120)
    assert same(left, start)
    assert found.steps == 0
    assert found.after == found.before == pytest.approx(0, abs=1e-6)


def test_worse_at_first_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience counts from the lowest check so far, not from the start, which the first steps may leave far below."""
    wanted = torch.from_numpy(output64(layer(0))).float()
    seen, left = checked(monkeypatch), near(3, 0.01)
    found = fit(left, problem(wanted, check_every=2, patience=0.1, rate=0.5, warm_up=1), 100)
    assert min(seen[1:7]) > 3 * seen[0]
    assert found.tried > 20


def test_rounded_once() -> None:
    """Steps far below the spacing of the dtype add up: what is left is the float32 fit, rounded when it is kept."""
    dtype = torch.bfloat16
    low = near(3, 0.3, dtype, GATED)
    high, aim = cast(low, torch.float32), problem(noisy())
    assert fit(low, aim, 30) == fit(high, aim, 30)
    assert {part.dtype for part in parts_of(low)} == {dtype}
    assert same(low, cast(high, dtype))


def test_one_expert_keeps_its_row() -> None:
    start, wanted = layer(2, experts=1), noisy()
    left = cast(start)
    found = fit(left, problem(wanted, top_k=1), 60)
    assert torch.equal(left[1], start[1])
    assert found.after < 0.9 * found.before
    assert found.after == pytest.approx(error64(left, wanted, top_k=1), rel=1e-3)


def test_an_expert_without_tokens_stays() -> None:
    """Its matrices bit for bit, while the others are fitted."""
    start = layer(2)
    bias = torch.zeros(TOKENS, 1)
    start[1][3] = 0
    inputs = torch.cat([INPUTS[:, :-1], bias + 5], dim=1)
    start[1][:3, -1], start[1][3, -1] = 1.0, -9.0
    left, aim = cast(start), problem(noisy())
    found = fit(left, Problem(inputs, aim.target, WEIGHT, HELD_OUT, Gate(TOP_K, False), silu), 20)
    assert found.after < found.before
    for name in PROJECTIONS:
        assert torch.equal(left[0][name][3], start[0][name][3])
        assert not torch.equal(left[0][name][0], start[0][name][0])


def test_experts_that_are_zero() -> None:
    """Nothing to fit, nothing to divide by."""
    start = layer(2)
    start = start[0].map(torch.zeros_like), start[1], {}
    left = cast(start)
    found = fit(left, problem(torch.zeros(TOKENS, HIDDEN)), 60)
    assert same(left, start)
    assert (found.before, found.after, found.steps) == (0, 0, 0)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_not_fitted_on_what_is_held_out() -> None:
    """Other wishes for the held-out tokens: the same layer after the same steps."""
    wanted, one, other = noisy(), near(3, 0.5), near(3, 0.5)
    louder = torch.where(HELD_OUT[:, None], 1.2 * wanted, wanted)
    found, again = fit(one, problem(wanted), 30), fit(other, problem(louder), 30)
    assert found.steps == again.steps == 30
    assert found.after != again.after
    assert same(one, other)


@pytest.mark.parametrize("most", [25, 80, 4096])
def test_some_of_the_tokens_held_out_are_checked(most: int) -> None:
    """Every n-th of them, so that at least so many are, where there are as many."""
    wanted, start = noisy(), layer(2)
    found = fit(cast(start), problem(wanted, checked_tokens=most), 1)
    some = HELD_OUT.nonzero()[:, 0][:: 3 if most == 25 else 1]
    assert found.before == pytest.approx(error64(start, wanted, some), rel=1e-4)


def epochs(seed: int, size: int) -> Iterator[list[torch.Tensor]]:
    batches = layer_fit._batches((~HELD_OUT).nonzero()[:, 0], size, seed)
    while True:
        yield list(islice(batches, math.ceil(int((~HELD_OUT).sum()) / size)))


def test_every_token_once_before_one_comes_again() -> None:
    """In another order every time, and none that is held out."""
    fitted = (~HELD_OUT).nonzero()[:, 0]
    first, second = islice(epochs(0, 64), 2)
    assert [len(batch) for batch in first] == [64, 64, 64, len(fitted) - 192]
    for epoch in (first, second):
        assert torch.equal(torch.cat(epoch).sort().values, fitted)
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert not torch.equal(torch.cat(first), torch.cat(next(epochs(1, 64))))


def test_repeats() -> None:
    """With the seed, whatever else draws random numbers, and drawing none of theirs; another draws other batches."""
    aim, state = problem(noisy(), batch=64), torch.get_rng_state()
    one, again, other = (near(3, 0.5) for _ in range(3))
    found = fit(one, aim, 25)
    assert fit(again, aim, 25) == found
    assert fit(other, aim, 25, seed=1) != found
    assert same(one, again)
    assert not same(one, other)
    assert torch.equal(torch.get_rng_state(), state)


# --- memory and progress ---------------------------------------------------------------------------------------------


def test_one_matrix_has_a_gradient_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is stepped before the next one has; a first moment each, a row and a column for the second."""
    take, taken, held = Descent._take, [], []

    def spy(self: Descent, parameter: torch.Tensor) -> None:
        assert [one is parameter for one in self.each if one.grad is not None] == [True]
        before = parameter.detach().clone()
        take(self, parameter)
        assert parameter.grad is None
        assert not torch.equal(parameter, before)
        taken.append(parameter.shape)
        state = [value for one in self.each.values() for kept in one.state.values() for value in kept.values()]
        held.append(sum(value.numel() for value in state if isinstance(value, torch.Tensor) and value.ndim))

    monkeypatch.setattr(Descent, "_take", spy)
    fit(near(3, 0.5), problem(noisy()), 3)
    assert sorted(taken) == sorted(
        3 * [*2 * EXPERTS * [(WIDTH, HIDDEN)], *EXPERTS * [(HIDDEN, WIDTH)], (EXPERTS, HIDDEN)]
    )
    first, second = 3 * EXPERTS * WIDTH * HIDDEN + EXPERTS * HIDDEN, 3 * EXPERTS * (WIDTH + HIDDEN) + EXPERTS + HIDDEN
    assert max(held) == first + second


def test_nothing_is_left_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters go when the fit is over: a tensor and the hook on it are no cycle that would be collected."""
    alive: list[weakref.ref[torch.Tensor]] = []

    class Watched(Descent):
        def __init__(self, parameters: list[torch.Tensor], *rest) -> None:
            alive.extend(map(weakref.ref, parameters))
            super().__init__(parameters, *rest)

    monkeypatch.setattr(layer_fit, "Descent", Watched)
    fit(near(3, 0.5), problem(noisy()), 2)
    assert len(alive) == 3 * EXPERTS + 1
    assert not [one for one in alive if one() is not None]


def test_progress() -> None:
    """Told at every check."""
    told: list[int] = []
    left = near(3, 0.5)
    fit_layer(problem(noisy(), check_every=4), *left, 10, 0, lambda event: told.append(event.step))
    assert told == [4, 8, 10]
