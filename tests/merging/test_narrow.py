"""A whole layer with fewer neurons on its text: what is kept bit for bit, what makes up for the rest, what is noted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from namex_hf.merging.experts import NotFiniteError
from namex_hf.merging.gate import Gate
from namex_hf.merging.moe_layer import MoELayer, Text
from namex_hf.merging.moments import of_peak
from namex_hf.merging.narrow import Narrowing
from namex_hf.merging.neurons import RIDGE
from namex_hf.merging.routing import TokenRouting
from namex_hf.merging.routing import neurons as neurons_of
from namex_hf.merging.settings import FitSettings
from namex_hf.recipe import Recipe
from tests.helpers.checkpoints import PROJECTIONS
from tests.helpers.mixtures import HIDDEN, WIDTH, draws, expert_at, random_experts, random_tokens
from tests.helpers.reference import double, gates64, neurons64, output64, shared64, usage64

EXPERTS, TOP_K, SEQUENCES, LENGTH = 6, 2, 4, 40
WEIGHTS = pytest.mark.parametrize("weights", ["none", "sequence"])
BOTH = pytest.mark.parametrize("neurons", ["second_order", "energy"])


def mixture(dtype: torch.dtype = torch.float32, renormalises: bool = False) -> MoELayer:
    router = torch.randn(EXPERTS, HIDDEN, generator=draws(1)).to(dtype)
    return MoELayer(random_experts(EXPERTS, 0, dtype), router, Gate(TOP_K, renormalises), silu)


def narrowing(
    of: MoELayer,
    width: int = 3,
    routing: TokenRouting | None = None,
    length: int = LENGTH,
    weights: str = "none",
    **fields,
) -> Narrowing:
    """On four sequences of tokens, the first louder than the others, the last held out."""
    inputs = random_tokens(SEQUENCES * length, 0)
    inputs[:length] *= 2
    text = Text(inputs, routing or of.route(inputs), torch.arange(SEQUENCES), torch.tensor([False, False, False, True]))
    return Narrowing(of, text, Recipe(merge="narrow", width=width, **fields).merge, error_weights=weights)


def weights64(run: Narrowing, of: MoELayer) -> np.ndarray:
    """Of errors: under ``sequence`` the output of every sequence has the same energy."""
    wanted = output64(run.text.inputs, run.text.routing, dict(of.experts))
    if run.error_weights == "none":
        return np.ones(len(wanted))
    each = 1 / np.sqrt((wanted**2).sum(1).reshape(SEQUENCES, -1).mean(1))
    return np.repeat(each / np.sqrt((each**2).mean()), len(wanted) // SEQUENCES)


def heard(run: Narrowing, of: MoELayer, number: int) -> np.ndarray:
    """Weighted gate value times neuron of an expert's own tokens, and below them the rows of the ridge."""
    gate = weights64(run, of) * gates64(run.text.routing, EXPERTS)[:, number]
    z = gate[:, None] * neurons64(run.text.inputs, expert_at(of.experts, number))
    return np.vstack([z, np.sqrt(RIDGE * (z**2).sum() / WIDTH) * np.eye(WIDTH)])


def without_tokens(number: int, of: MoELayer, tokens: int) -> TokenRouting:
    """Two other experts for every token but the first few, which `number` and the last one get."""
    index = torch.tensor([[one for one in range(EXPERTS) if one != number][:TOP_K]]).repeat(SEQUENCES * LENGTH, 1)
    index[:tokens] = torch.tensor([number, (number + 3) % EXPERTS])
    return TokenRouting(index, 0.2 + torch.rand(SEQUENCES * LENGTH, TOP_K, generator=draws(5)))


@BOTH
@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_ups_and_router_stay_bit_for_bit(neurons: str, renormalises: bool, dtype: torch.dtype) -> None:
    of = mixture(dtype, renormalises)
    run = narrowing(of, neurons=neurons)
    result, _ = run.run()
    assert torch.equal(result.router, of.router)
    assert result.gate == of.gate
    assert run.stay.shape == (EXPERTS, 3)
    for number, stay in enumerate(run.stay):
        assert stay.tolist() == sorted({*stay.tolist()})
        for name in ("gate_proj", "up_proj"):
            assert torch.equal(result.experts[name][number], of.experts[name][number][stay])
    assert result.experts["down_proj"].shape == (EXPERTS, HIDDEN, 3)
    assert {matrix.dtype for matrix in result.experts.values()} == {dtype}


@BOTH
@WEIGHTS
def test_downs_come_nearest_to_what_the_expert_put_out(neurons: str, weights: str) -> None:
    """On the expert's own tokens, by their gate values; a sweep looks at the layer's output instead."""
    of = mixture()
    run = narrowing(of, neurons=neurons, weights=weights, sweeps=0)
    result, _ = run.run()
    for number, stay in enumerate(run.stay):
        rows = heard(run, of, number)
        wanted = rows @ double(of.experts["down_proj"][number]).T
        best = np.linalg.lstsq(rows[:, stay], wanted, rcond=None)[0].T
        np.testing.assert_allclose(double(result.experts["down_proj"][number]), best, rtol=1e-3, atol=1e-4)


def test_the_choice_of_one_neuron_is_the_best_there_is() -> None:
    of = mixture()
    run = narrowing(of, width=WIDTH - 1, sweeps=0)
    run.run()
    for number, stay in enumerate(run.stay):
        rows = heard(run, of, number)
        wanted = rows @ double(of.experts["down_proj"][number]).T
        losses = [np.linalg.lstsq(np.delete(rows, gone, 1), wanted, rcond=None)[1].sum() for gone in range(WIDTH)]
        assert {*range(WIDTH)} - {*stay.tolist()} == {int(np.argmin(losses))}


@BOTH
@WEIGHTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_errors_are_those_of_the_result(neurons: str, weights: str, dtype: torch.dtype) -> None:
    of = mixture(dtype)
    run = narrowing(of, neurons=neurons, weights=weights)
    result, output = run.run()
    inputs, routing = run.text.inputs, run.text.routing
    found, wanted = (output64(inputs, routing, dict(experts)) for experts in (result.experts, of.experts))
    np.testing.assert_allclose(output.numpy(), found, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(run.target.numpy(), wanted, rtol=1e-3, atol=1e-3)
    (noted,) = run.record["errors"]
    assert noted["stage"] == "narrowed"
    weight = weights64(run, of)[:, None]
    error, energy = ((weight * (found - wanted)) ** 2).sum(), ((weight * wanted) ** 2).sum()
    assert noted["error"] == pytest.approx(error / energy, rel=1e-3)
    assert 0 < noted["error"] < 0.5
    assert run.record["usage"] == usage64(routing, EXPERTS).tolist()
    np.testing.assert_allclose(run.record["mass"], gates64(routing, EXPERTS).sum(0), rtol=1e-6)


def test_second_order_leaves_less_than_energy() -> None:
    errors = []
    for neurons in ("second_order", "energy"):
        run = narrowing(mixture(), width=2, neurons=neurons)
        run.run()
        errors.append(run.record["errors"][0]["error"])
    assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_an_expert_of_too_few_tokens_is_cut_by_its_weights(tokens: int, gated: bool) -> None:
    """Fewer than neurons that stay, or none at all: its downs are as they were, bit for bit; others are refitted."""
    of = mixture()
    of = of if gated else replace(of, experts=replace(of.experts, gate=None))
    run = narrowing(of, routing=without_tokens(2, of, tokens))
    result, _ = run.run()
    assert run.record["usage"][2] == tokens
    norms = [np.linalg.norm(double(of.experts[name][2]), axis=int(name != "down_proj")) for name in of.experts]
    stay = sorted(np.argsort(-np.prod(norms, axis=0))[:3].tolist())
    assert run.stay[2].tolist() == stay
    assert torch.equal(result.experts["down_proj"][2], of.experts["down_proj"][2][:, stay])
    assert not torch.equal(result.experts["down_proj"][0], of.experts["down_proj"][0][:, run.stay[0]])


def test_as_many_tokens_as_neurons_are_enough() -> None:
    of = mixture()
    run = narrowing(of, routing=without_tokens(2, of, 3))
    result, _ = run.run()
    assert not torch.equal(result.experts["down_proj"][2], of.experts["down_proj"][2][:, run.stay[2]])


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tokens", [0, 40])
def test_damage_names_the_expert(name: str, tokens: int) -> None:
    """Whether it has tokens or not."""
    of = mixture()
    run = narrowing(of, routing=without_tokens(2, of, tokens))
    of.experts[name][2][1, 1] = float("nan")
    with pytest.raises(NotFiniteError) as error:
        run.run()
    assert (error.value.expert, error.value.projection) == (2, name)


@BOTH
@pytest.mark.parametrize("error_weights", ["none", "sequence"])
def test_a_sweep_leaves_less_of_the_error(neurons: str, error_weights: str) -> None:
    """Of the whole layer, each sweep less; gates and ups stay those of the source, bit for bit."""
    errors = []
    for sweeps in (0, 1, 3):
        of = mixture()
        run = narrowing(of, neurons=neurons, sweeps=sweeps)
        run.error_weights = error_weights
        result, output = run.run()
        errors.append(run.record["errors"][0]["error"])
        for number, stay in enumerate(run.stay):
            assert (stay.diff() > 0).all()
            for name in ("gate_proj", "up_proj"):
                assert torch.equal(result.experts[name][number], of.experts[name][number][stay])
        inputs = run.text.inputs
        found = output64(inputs, run.text.routing, dict(result.experts))
        np.testing.assert_allclose(output.numpy(), found, rtol=1e-3, atol=1e-3)
    assert errors[0] > 1.02 * errors[1]
    assert errors[1] > errors[2]


def joint_moment(run: Narrowing, of: MoELayer) -> np.ndarray:
    """H of the neurons of all experts together, each expert's with its own ridge, float64 ``[all, all]``."""
    routing, inputs = run.text.routing, run.text.inputs
    blocks, ridge = [], []
    for number in range(EXPERTS):
        token, gate = routing.of(number)
        z = np.zeros((len(inputs), WIDTH))
        z[token.numpy()] = double(gate)[:, None] * double(neurons_of(inputs[token], of.experts.expert(number), silu))
        blocks.append(z)
        ridge += [RIDGE * (z**2).sum(0).mean()] * WIDTH
    whole = np.concatenate(blocks, axis=1)
    return whole.T @ whole + np.diag(ridge)


def side_by_side(downs: torch.Tensor) -> np.ndarray:
    return np.concatenate([double(down) for down in downs], axis=1)


def test_after_many_sweeps_downs_are_the_least_squares_of_all() -> None:
    """Together, under the ridge that holds them to the source's; for neurons that no longer change."""
    of = mixture()
    run = narrowing(of, neurons="random", sweeps=60)
    result, _ = run.run()
    moment = joint_moment(run, of)
    stay = np.concatenate([one + number * WIDTH for number, one in enumerate(run.stay)])
    downs = side_by_side(of.experts["down_proj"])
    best = np.linalg.solve(moment[np.ix_(stay, stay)], moment[stay] @ downs.T).T
    np.testing.assert_allclose(side_by_side(result.experts["down_proj"]), best, rtol=1e-3, atol=1e-3)


def test_an_expert_sees_what_those_before_it_became() -> None:
    """In one sweep, block by block from the first expert on, as in float64."""
    of = mixture()
    run = narrowing(of, neurons="random", sweeps=1)
    after = side_by_side(run.run()[0].experts["down_proj"])
    before = narrowing(of, neurons="random", sweeps=0).run()[0].experts["down_proj"]
    moment, downs = joint_moment(run, of), side_by_side(of.experts["down_proj"])
    current = np.zeros_like(downs)
    places = [(one + number * WIDTH).numpy() for number, one in enumerate(run.stay)]
    for place, down in zip(places, before, strict=True):
        current[:, place] = double(down)
    for place in places:
        current[:, place] = 0
        missing = (downs - current) @ moment[:, place]
        current[:, place] = np.linalg.solve(moment[np.ix_(place, place)], missing.T).T
    np.testing.assert_allclose(after, current[:, np.concatenate(places)], rtol=1e-3, atol=1e-3)


def test_a_sweep_leaves_an_expert_with_few_tokens_alone() -> None:
    of = mixture()
    runs = [narrowing(of, routing=without_tokens(2, of, 2), sweeps=sweeps) for sweeps in (0, 1)]
    before, after = (run.run()[0].experts for run in runs)
    assert all(torch.equal(before[name][2], after[name][2]) for name in PROJECTIONS)
    assert not torch.equal(before["down_proj"][0], after["down_proj"][0])


def test_biases_of_neurons_go_with_them() -> None:
    """That of the output stays whole."""
    of, draw = mixture(), draws(9)
    biases = {f"{name}_bias": torch.randn(EXPERTS, WIDTH, generator=draw) for name in ("gate", "up")}
    of = replace(of, experts=replace(of.experts, **biases, down_bias=torch.randn(EXPERTS, HIDDEN, generator=draw)))
    run = narrowing(of)
    experts = run.run()[0].experts
    assert torch.equal(experts["down_proj.bias"], of.experts["down_proj.bias"])
    for number, stay in enumerate(run.stay):
        for name in ("gate_proj.bias", "up_proj.bias"):
            assert torch.equal(experts[name][number], of.experts[name][number][stay])
    assert run.record["errors"][0]["error"] < 0.5


def test_source_and_text_are_left_alone() -> None:
    of, untouched = mixture(), mixture()
    run = narrowing(of, fit="layer", fit_steps=5)
    inputs = run.text.inputs.clone()
    run.run()
    assert torch.equal(of.router, untouched.router)
    assert all(torch.equal(of.experts[name], untouched.experts[name]) for name in PROJECTIONS)
    assert torch.equal(run.text.inputs, inputs)


def test_a_fit_goes_on_from_there() -> None:
    """It makes the error smaller; what it makes of the shared expert is noted, and part of the output."""
    whole = {name: random_experts(2, 50)[name].flatten(0, 1) for name in ("gate_proj", "up_proj")}
    whole["down_proj"] = torch.cat(list(random_experts(2, 50)["down_proj"]), dim=1)
    of = mixture()
    run = narrowing(of, width=2, length=200, fit="layer", fit_steps=60)
    run.shared, run.settings = lambda: whole, FitSettings(rate=0.003)
    result, output = run.run()
    first, second = run.record["errors"]
    assert (first["stage"], second["stage"]) == ("narrowed", "layer")
    assert second["error"] < 0.9 * first["error"]
    assert [fit["of"] for fit in run.record["fits"]] == ["layer"]
    inputs = run.text.inputs
    delta = shared64(inputs, run.refitted) - shared64(inputs, whole)
    assert run.shared_output_delta is not None
    np.testing.assert_allclose(run.shared_output_delta.numpy(), delta, rtol=1e-3, atol=1e-3)
    found = output64(inputs, result.route(inputs), dict(result.experts)) + delta
    np.testing.assert_allclose(output.numpy(), found, rtol=1e-3, atol=1e-3)
    wanted = output64(inputs, run.text.routing, dict(of.experts))
    assert second["error"] == pytest.approx(((found - wanted) ** 2).sum() / (wanted**2).sum(), rel=1e-3)


@BOTH
def test_a_super_expert_is_named_and_keeps_the_neurons_that_carry_its_peak(neurons: str) -> None:
    """Planted: a neuron of expert 1 that is loud on one token, whose gate value is so small that the neuron would go.
    An expert that is never reached is none."""
    of = mixture()
    assert _super(narrowing(of, neurons=neurons)) == []
    routing, planted, token = without_tokens(1, of, 0), WIDTH - 1, 3
    inputs = narrowing(of, routing=routing).text.inputs
    direction = inputs[token] / inputs[token].square().sum()
    for matrices in (of.experts.gate, of.experts.up):
        matrices[1][planted] = 100 * direction
    of.experts.down[1][:, planted] = 0
    of.experts.down[1][0, planted] = 1
    silent = (inputs @ direction < -0.2).nonzero().flatten()
    assert len(silent) > WIDTH
    routing.index[silent] = torch.tensor([1, 4])
    routing.index[token], routing.value[token, 0] = torch.tensor([1, 4]), 1e-6
    run = narrowing(of, neurons=neurons, routing=routing)
    assert _super(run) == [1]
    token, _ = run.text.routing.of(1)
    loud = of.experts.expert(1)
    assert of_peak(neurons_of(run.text.inputs[token], loud, silu), loud.down).tolist() == [planted]
    assert planted in run.stay[1].tolist()
    assert _super(narrowing(of, neurons=neurons, routing=without_tokens(1, of, 0))) == []


def _super(run: Narrowing) -> list[int]:
    run.run()
    return run.record["super_experts"]
