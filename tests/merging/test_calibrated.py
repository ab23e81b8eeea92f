"""A whole layer on its text: what is kept bit for bit, what is written down, and whose error is made small."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from namex_hf.merging import calibrated, rewriting
from namex_hf.merging.calibrated import Shrinking
from namex_hf.merging.combine import averages
from namex_hf.merging.controls import random_experts as controls
from namex_hf.merging.controls import shared_experts
from namex_hf.merging.experts import NotFiniteError
from namex_hf.merging.gate import Gate
from namex_hf.merging.grouping import groups_by_damage, groups_by_outputs, groups_by_router, groups_by_weights
from namex_hf.merging.layer_fit import Problem
from namex_hf.merging.moe_layer import MoELayer, Text
from namex_hf.merging.moments import of_peak
from namex_hf.merging.neurons import refitted, ridged
from namex_hf.merging.router_fit import RouterProblem
from namex_hf.merging.routing import neurons
from namex_hf.merging.settings import FitSettings
from namex_hf.recipe import Recipe
from tests.helpers.checkpoints import PROJECTIONS
from tests.helpers.mixtures import HIDDEN, draws, random_experts, random_tokens
from tests.helpers.reference import answers64, double, gates64, output64, saliency64, shared64, usage64

EXPERTS, TOP_K, SEQUENCES, LENGTH = 6, 2, 4, 40
GROUPINGS = ("damage", "outputs", "router", "weights")
FITTED = {"down": "refit", "fit": "router", "fit_steps": 50}
PLAIN = {"down": "merge", "fit": "none"}
WHOLE = {"down": "refit", "fit": "layer", "fit_steps": 25}
SALIENT = {"weighting": "saliency"}


def mixture(seed: int = 0, dtype: torch.dtype = torch.float32, renormalises: bool = False) -> MoELayer:
    router = torch.randn(EXPERTS, HIDDEN, generator=draws(seed + 1)).to(dtype)
    return MoELayer(random_experts(EXPERTS, seed, dtype), router, Gate(TOP_K, renormalises), silu)


def text(of: MoELayer, loud: float, length: int) -> Text:
    """Of four sequences the last is held out, and the first is louder."""
    inputs = random_tokens(SEQUENCES * length, 0)
    inputs[:length] *= loud
    return Text(inputs, of.route(inputs), torch.arange(SEQUENCES), torch.tensor([False, False, False, True]))


def shrinking(count: int, of: MoELayer | None = None, loud: float = 1.0, length: int = LENGTH, **choices) -> Shrinking:
    """A control is made without its fit where ``fit`` is none."""
    of, seed = of or mixture(), choices.pop("seed", 0)
    operator = choices.get("operator", "merge")
    fields = {"curvature": "calibrated", "align": "activations"} if operator == "merge" else {}
    fields |= {"grouping": "damage", "down": "refit", **choices}
    fits = fields.get("fit") != "none"
    if not fits:
        fields.pop("fit_steps", None)
    if operator in ("random", "shared") and not fits:
        fields["fit"] = "router"
    merge = Recipe(merge="grouped", experts=count, **fields).merge
    return Shrinking(of, text(of, loud, length), merge, seed, "sequence", fits=fits)


def shared() -> dict[str, torch.Tensor]:
    """A shared expert of two slices, behind a gate."""
    of = random_experts(2, 50)
    whole = {name: torch.cat(list(of[name]), dim=int(name == "down_proj")) for name in PROJECTIONS}
    return {**whole, "gate": torch.randn(1, HIDDEN, generator=draws(51))}


def weights64(wanted: np.ndarray) -> np.ndarray:
    """Weights of the squared errors, up to scale: 1 over the energy of the token's sequence."""
    energy = (wanted.reshape(SEQUENCES, -1) ** 2).sum(1)
    return np.repeat(1 / energy, len(wanted) // SEQUENCES)


def error64(found: np.ndarray, wanted: np.ndarray) -> float:
    """The mean over sequences of their relative errors."""
    missed, whole = (((x.reshape(SEQUENCES, -1)) ** 2).sum(1) for x in (found - wanted, wanted))
    return float((missed / whole).mean())


def output_of(result: MoELayer, inputs: torch.Tensor) -> np.ndarray:
    return output64(inputs, result.route(inputs), dict(result.experts))


def assert_same(one: MoELayer, other: MoELayer) -> None:
    assert torch.equal(one.router, other.router)
    assert all(torch.equal(one.experts[name], other.experts[name]) for name in PROJECTIONS)


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [PLAIN, FITTED, WHOLE, {**PLAIN, "operator": "keep", "grouping": "none"}])
def test_all_experts_are_the_layer_itself(how: dict) -> None:
    of = mixture(dtype=torch.bfloat16)
    run = shrinking(EXPERTS, of, **how)
    result, output = run.run()
    assert_same(result, of)
    assert result.gate.top_k == TOP_K
    np.testing.assert_allclose(output.numpy(), output_of(of, run.text.inputs), rtol=1e-3, atol=1e-3)
    assert set(run.record) == {"usage", "mass", "games"}
    assert run.record["games"] == []


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_one_are_their_experts(grouping: str, dtype: torch.dtype) -> None:
    of = mixture(dtype=dtype)
    run = shrinking(4, of, grouping=grouping, **PLAIN)
    result, _ = run.run()
    single = [(place, group[0]) for place, group in enumerate(run.record["groups"]) if len(group) == 1]
    assert single
    for place, number in single:
        assert torch.equal(result.router[place], of.router[number])
        assert all(torch.equal(result.experts[name][place], of.experts[name][number]) for name in PROJECTIONS)


@pytest.mark.parametrize("how", [PLAIN, FITTED, WHOLE, {**WHOLE, "operator": "keep"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_source_and_text_are_left_alone(how: dict, dtype: torch.dtype) -> None:
    of = mixture(dtype=dtype)
    run, untouched = shrinking(3, of, **how), shrinking(3, mixture(dtype=dtype))
    run.run()
    assert_same(of, untouched.source)
    for name in ("inputs", "held_out"):
        assert torch.equal(getattr(run.text, name), getattr(untouched.text, name))
    assert torch.equal(run.text.routing.value, untouched.text.routing.value)


def test_groupings() -> None:
    """Each by its own: errors weighted by sequence, mean answers, gate values, weights of whole experts."""
    run = shrinking(3, loud=3.0)
    inputs, experts = run.text.inputs, run.source.experts
    answers, gates = answers64(inputs, experts), gates64(run.text.routing, EXPERTS)
    heavy = np.sqrt(weights64(np.einsum("tn,tnh->th", gates, answers)))[:, None]
    flat = torch.cat([experts[name].flatten(1) for name in PROJECTIONS], dim=1).double()
    gram = torch.from_numpy(np.einsum("tih,tjh->tij", answers, answers))
    wanted = {
        "damage": groups_by_damage(gram, torch.from_numpy(heavy * gates), 3),
        "outputs": groups_by_outputs(torch.from_numpy(answers.mean(0)), 3),
        "router": groups_by_router(torch.from_numpy(gates), 3),
        "weights": groups_by_weights(flat @ flat.T, 3),
    }
    assert len(set(wanted.values())) == 4
    assert groups_by_damage(gram, torch.from_numpy(gates), 3) != wanted["damage"]
    for grouping in GROUPINGS:
        run = shrinking(3, loud=3.0, grouping=grouping, **PLAIN)
        run.run()
        assert run.record["groups"] == [list(group) for group in wanted[grouping]]


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("how", [PLAIN, FITTED, {**FITTED, "fit": "none"}, {**FITTED, "down": "merge"}])
def test_output_is_that_of_the_result(grouping: str, how: dict) -> None:
    """And its error the one written down last; shapes, dtypes and top-k are those of a smaller layer."""
    for dtype, renormalises, count in product((torch.float32, torch.bfloat16), (False, True), (1, 3)):
        of = mixture(dtype=dtype, renormalises=renormalises)
        run = shrinking(count, of, loud=3.0, grouping=grouping, **how)
        result, output = run.run()
        assert (len(result.router), result.gate.top_k) == (count, min(count, TOP_K))
        assert result.gate.renormalises == renormalises
        assert {result.router.dtype, *(result.experts[name].dtype for name in PROJECTIONS)} == {dtype}
        wanted, found = (output_of(one, run.text.inputs) for one in (of, result))
        np.testing.assert_allclose(output.numpy(), found, rtol=1e-3, atol=1e-4 * np.abs(found).max())
        assert run.record["errors"][-1]["error"] == pytest.approx(error64(found, wanted), rel=1e-3)


@pytest.mark.parametrize("operator", ["merge", "keep", "random", "shared"])
def test_output_is_that_of_the_result_whatever_it_began_with(operator: str) -> None:
    moved = []
    for dtype, count, how in product((torch.float32, torch.bfloat16), (1, 4), (PLAIN, WHOLE)):
        of = mixture(dtype=dtype)
        run = shrinking(count, of, loud=3.0, length=4 * LENGTH, operator=operator, **how)
        run.shared = shared
        result, output = run.run()
        assert (len(result.router), result.gate.top_k) == (count, min(count, TOP_K))
        assert {result.router.dtype, *(result.experts[name].dtype for name in PROJECTIONS)} == {dtype}
        wanted, found = (output_of(one, run.text.inputs) for one in (of, result))
        if how is WHOLE:  # the shared expert is fitted along, and what it answers now is more than what it did
            moved.append(any(not torch.equal(run.refitted[part], tensor) for part, tensor in shared().items()))
            assert moved[-1] == (run.record["fits"][-1]["steps"] > 0)
            found += shared64(run.text.inputs, run.refitted) - shared64(run.text.inputs, shared())
        else:
            assert run.refitted == {}
        np.testing.assert_allclose(output.numpy(), found, rtol=1e-3, atol=1e-4 * np.abs(found).max())
        assert run.record["errors"][-1]["error"] == pytest.approx(error64(found, wanted), rel=1e-3)
        assert (run.record["games"] == []) == (operator != "merge")
    assert any(moved)


ONCE, MERGED, REFIT = TOP_K, TOP_K, 2 * TOP_K  # the source's output; that of a result; two sweeps over the downs
ROWS = 3 + TOP_K  # all three experts of the result, for a fit of its rows, and its output after that


@pytest.mark.parametrize(
    ("choices", "answers"),
    [
        (PLAIN, ONCE + MERGED),
        ({**PLAIN, **SALIENT}, ONCE + MERGED),
        ({"down": "refit", "fit": "none"}, ONCE + MERGED + REFIT),
        ({**PLAIN, "grouping": "outputs"}, ONCE + EXPERTS + MERGED),
        (FITTED, ONCE + MERGED + 2 * (ROWS + REFIT)),
        ({**FITTED, "grouping": "damage"}, ONCE + EXPERTS + MERGED + 2 * (ROWS + REFIT)),
        ({**FITTED, "down": "merge"}, ONCE + MERGED + ROWS),
    ],
    ids=str,
)
def test_how_many_experts_answer_a_token(choices: dict, answers: int) -> None:
    """Experts that are kept; merging asks further. As docs/design.md has it."""
    rows = []

    def counting(inputs: torch.Tensor) -> torch.Tensor:
        rows.append(len(inputs))
        return silu(inputs)

    how = {"operator": "keep", "weighting": "usage", "grouping": "weights", **choices}
    one = shrinking(3, replace(mixture(), activation=counting), **how)
    one.run()
    assert sum(rows) == answers * len(one.text.inputs)


def test_errors_fall_from_stage_to_stage() -> None:
    for seed in range(4):
        run = shrinking(3, mixture(seed), length=10 * LENGTH, **FITTED)
        told: list[str] = []
        run.progress = lambda event, told=told: told.append(str(event))
        run.run()
        stages, errors = zip(*(entry.values() for entry in run.record["errors"]), strict=True)
        assert list(stages) == told == ["merged", "router", "down", "router", "down"]
        assert errors[0] > 1.02 * errors[1] > 1.02**2 * errors[2]
        assert errors[4] < errors[2]
        assert all(fit["after"] <= fit["before"] for fit in run.record["fits"])


@pytest.mark.parametrize(
    ("how", "stages"),
    [
        (PLAIN, ["merged"]),
        ({**FITTED, "fit": "none"}, ["merged", "down"]),
        ({**FITTED, "down": "merge"}, ["merged", "router"]),
        (WHOLE, ["merged", "router", "down", "router", "down", "layer"]),
        ({**WHOLE, "down": "merge"}, ["merged", "router", "layer"]),
        ({**WHOLE, "operator": "random"}, ["merged", "router", "down", "router", "down", "layer"]),
    ],
)
def test_stages(how: dict, stages: list[str]) -> None:
    run = shrinking(3, **how)
    told: list[str] = []
    run.progress = lambda event: told.append(str(event))
    run.run()
    assert [entry["stage"] for entry in run.record["errors"]] == stages
    assert [fit["of"] for fit in run.record["fits"]] == [stage for stage in stages if stage in ("router", "layer")]
    steps = [what for what in told if what not in stages]
    assert steps == (["fitted, step 25 of 25"] if "layer" in stages else [])
    assert [what for what in told if what in stages] == stages


def test_one_expert_has_no_router_to_fit() -> None:
    run = shrinking(1, **FITTED)
    run.run()
    assert {entry["stage"] for entry in run.record["errors"]} == {"merged", "down"}
    assert run.record["fits"] == []
    whole = shrinking(1, **WHOLE)
    result, _ = whole.run()
    assert [fit["of"] for fit in whole.record["fits"]] == ["layer"]
    assert torch.equal(result.router, averages(whole.source.router, whole.groups, whole.mass))


def test_a_fit_of_the_layer_ends_below_what_it_began_with() -> None:
    """On the sequence that is held out as on all; what it says is what it did."""
    for seed in range(3):
        of = mixture(seed)
        run = shrinking(3, of, length=10 * LENGTH, **{**WHOLE, "fit_steps": 60})
        result, _ = run.run()
        *_, before, after = (entry["error"] for entry in run.record["errors"])
        fit = run.record["fits"][-1]
        assert set(fit) == {"of", "before", "after", "steps", "tried"}
        assert after < 0.95 * before
        assert fit["after"] < 0.95 * fit["before"]
        assert fit["steps"] == fit["tried"] == 60
        missed, wanted = (output_of(one, run.text.inputs)[-10 * LENGTH :] for one in (result, of))
        relative = ((missed - wanted) ** 2).sum() / (wanted**2).sum()
        assert fit["after"] == pytest.approx(relative, rel=1e-3)


@pytest.mark.parametrize("count", [1, 3])
def test_what_the_layer_is_fitted_to(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens, weighted, and what is wanted of them, the shared expert's own answer besides; the last sequence held
    out; steps and seed as stated."""
    fit, seen = rewriting.fit_layer, []

    def spy(problem: Problem, experts, router, beside, steps: int, seed: int, advance):
        assert all(torch.equal(beside[part], tensor) for part, tensor in shared().items())
        seen.append((problem, steps, seed))
        return fit(problem, experts, router, beside, steps, seed, advance)

    monkeypatch.setattr(rewriting, "fit_layer", spy)
    run, wanted = aiming(count, of=mixture(renormalises=True), loud=5.0, seed=4, **WHOLE)
    run.shared = shared
    run.run()
    ((problem, steps, seed),) = seen
    assert (steps, seed) == (25, 4)
    assert (problem.gate, problem.activation) == (Gate(min(count, TOP_K), True), silu)
    assert torch.equal(problem.inputs, run.text.inputs)
    together = wanted + shared64(run.text.inputs, shared())
    np.testing.assert_allclose(double(problem.target), together, rtol=1e-3, atol=1e-3)
    weight = weights64(wanted)
    np.testing.assert_allclose(double(problem.weight) ** 2, weight / weight.mean(), rtol=1e-4)
    assert problem.held_out.tolist() == 3 * LENGTH * [False] + LENGTH * [True]


def test_record() -> None:
    run = shrinking(3, **FITTED)
    run.run()
    gates = gates64(run.text.routing, EXPERTS)
    assert set(run.record) == {"usage", "mass", "games", "peaks", "super_experts", "groups", "errors", "fits"}
    assert run.record["usage"] == (gates > 0).sum(0).tolist()
    assert run.record["mass"] == pytest.approx(gates.sum(0).tolist())
    assert sorted(number for group in run.record["groups"] for number in group) == list(range(EXPERTS))
    larger = [group for group in run.record["groups"] if len(group) > 1]
    assert [sorted(game["members"]) for game in run.record["games"]] == [group for group in larger for _ in range(3)]
    for game in run.record["games"]:  # around the one with the largest gate values
        assert game["members"] == sorted(game["members"], key=lambda number: -gates[:, number].sum())
    flat = np.concatenate([double(run.source.experts[name]).reshape(EXPERTS, -1) for name in PROJECTIONS], axis=1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(run.cosines[0].numpy(), flat @ flat.T, atol=1e-5)


def test_rows_are_means_by_gate_values() -> None:
    """Of a group that has none, plain means."""
    of = mixture()
    of.router[3:] = -50 * torch.ones(HIDDEN)
    inputs = random_tokens(SEQUENCES * LENGTH, 0).abs()
    run = shrinking(2, of, **PLAIN)
    run.text = replace(run.text, inputs=inputs, routing=of.route(inputs))
    run.find_groups = lambda: ((0, 1, 2), (3, 4, 5))
    rows = double(run.run()[0].router)
    mass = gates64(run.text.routing, EXPERTS).sum(0)
    np.testing.assert_allclose(rows[0], np.average(double(of.router[:3]), axis=0, weights=mass[:3]), rtol=1e-5)
    assert mass[3:].max() == 0
    np.testing.assert_allclose(rows[1], double(of.router[3:]).mean(0))


@pytest.mark.parametrize("how", [PLAIN, FITTED, WHOLE, {**WHOLE, "operator": "random"}])
def test_repeats(how: dict) -> None:
    one, again, other = (shrinking(3, seed=seed, length=4 * LENGTH, **how) for seed in (0, 0, 1))
    result = one.run()[0]
    assert_same(again.run()[0], result)
    assert one.record == again.record
    assert torch.equal(other.run()[0].router, result.router) == (how["fit"] == "none")


# --- what a group becomes --------------------------------------------------------------------------------------------


def seen64(run: Shrinking, by: str) -> np.ndarray:
    """What experts are kept by."""
    if by == "usage":
        return usage64(run.text.routing, EXPERTS)
    return saliency64(run.text.inputs, run.text.routing, dict(run.source.experts))


def assert_kept(result: MoELayer, of: MoELayer, numbers: list[int]) -> None:
    assert torch.equal(result.router, of.router[numbers])
    assert all(torch.equal(result.experts[name], of.experts[name][numbers]) for name in PROJECTIONS)


BY = {"usage": {"weighting": "usage"}, "saliency": SALIENT}


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weightiest_of_the_layer_are_kept(by: str, dtype: torch.dtype) -> None:
    """Bit for bit and in their order, rows and all; by usage others than by saliency."""
    kept = {}
    for seed in range(4):
        run = shrinking(3, mixture(seed, dtype), operator="keep", grouping="none", **BY[by], **PLAIN)
        result, _ = run.run()
        numbers = sorted(np.argsort(-seen64(run, by), kind="stable")[:3].tolist())
        assert_kept(result, run.source, numbers)
        assert run.record["kept"] == numbers
        assert run.record["groups"] == [[number] for number in numbers]
        assert run.record["games"] == []
        kept[seed] = numbers, sorted(np.argsort(-seen64(run, "usage"))[:3].tolist())
    assert any(one != other for one, other in kept.values()) == (by == "saliency")


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_weightiest_of_each_group_is_kept(by: str, grouping: str) -> None:
    run = shrinking(3, operator="keep", grouping=grouping, **BY[by], **PLAIN)
    merged = shrinking(3, grouping=grouping, **PLAIN)
    result, _ = run.run()
    merged.run()
    assert run.record["groups"] == merged.record["groups"]
    numbers = [max(group, key=lambda number: seen64(run, by)[number]) for group in run.record["groups"]]
    assert run.record["kept"] == numbers
    assert_kept(result, run.source, numbers)


def test_experts_of_equal_standing_are_kept_in_order() -> None:
    """Also of those without tokens, whose rows are kept like any other's."""
    of = mixture()
    of.router[2:] = -50 * torch.ones(HIDDEN)
    inputs = random_tokens(SEQUENCES * LENGTH, 0).abs()
    run = shrinking(4, of, operator="keep", grouping="none", **PLAIN)
    run.text = replace(run.text, inputs=inputs, routing=of.route(inputs))
    result, _ = run.run()
    assert run.record["usage"] == [160, 160, 0, 0, 0, 0]
    assert_kept(result, of, [0, 1, 2, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saliency_is_written_down_and_weighs(dtype: torch.dtype) -> None:
    """Mean of gate value times norm of the answer, where it is asked for: the shares of a group's members."""
    run, other = shrinking(2, mixture(0, dtype), loud=5.0, **SALIENT, **PLAIN), shrinking(2, **PLAIN)
    run.run()
    other.run()
    saliency = seen64(run, "saliency")
    assert run.record["saliency"] == pytest.approx(saliency.tolist(), rel=1e-4)
    assert "saliency" not in other.record
    assert run.record["games"]
    for game in run.record["games"]:
        wanted = saliency[game["members"]] / saliency[game["members"]].sum()
        assert game["weights"] == pytest.approx(wanted.tolist(), rel=1e-4)
        assert game["status"] == "saliency"


def test_shares_by_usage_are_of_the_tokens() -> None:
    """Not of the gate values, by which members are ranked."""
    run = shrinking(2, loud=5.0, **BY["usage"], **PLAIN)
    run.run()
    usage = seen64(run, "usage")
    for game in run.record["games"]:
        wanted = usage[game["members"]] / usage[game["members"]].sum()
        assert game["weights"] == pytest.approx(wanted.tolist())


def test_strangers_in_the_place_of_groups() -> None:
    """The controls' experts, under the groups' rows."""
    merged, drawn, sliced = (shrinking(3, operator=one, seed=3, **PLAIN) for one in ("merge", "random", "shared"))
    sliced.shared = shared
    rows = merged.run()[0].router
    for run, wanted in ((drawn, controls(drawn.source.experts, 3, 3)), (sliced, None)):
        result, _ = run.run()
        wanted = wanted or shared_experts(shared(), run.source.experts, 3)
        assert_same(result, replace(result, experts=wanted, router=rows))
        assert run.record["groups"] == merged.record["groups"]
        assert run.record["games"] == []
        assert "kept" not in run.record


# --- what is wanted --------------------------------------------------------------------------------------------------


def aiming(count: int, **how) -> tuple[Shrinking, np.ndarray]:
    """A layer that is to answer as another would."""
    run = shrinking(count, **how)
    wanted = mixture(8).output(run.text.inputs, mixture(8).route(run.text.inputs))
    run.text = replace(run.text, target=wanted)
    return run, double(wanted)


@pytest.mark.parametrize("how", [PLAIN, {**FITTED, "fit": "none"}, {**FITTED, "down": "merge"}, FITTED, WHOLE])
def test_errors_are_those_of_the_output_wanted(how: dict) -> None:
    """Where one is given; and every fit is to that."""
    run, wanted = aiming(3, length=3 * LENGTH, **how)
    result, _ = run.run()
    assert run.record["errors"][-1]["error"] == pytest.approx(
        error64(output_of(result, run.text.inputs), wanted), rel=1e-3
    )
    weight = weights64(wanted)
    np.testing.assert_allclose(double(run.weight) ** 2, weight / weight.mean(), rtol=1e-4)
    own, _ = shrinking(3, length=3 * LENGTH, **how).run()
    found, other = (error64(output_of(one, run.text.inputs), wanted) for one in (result, own))
    assert found < (0.9 * other if how != PLAIN else 1.1 * other)


def test_a_layer_that_keeps_all_experts_answers_as_it_does() -> None:
    """Whatever is wanted: nothing is fitted."""
    run, wanted = aiming(EXPERTS, **FITTED)
    result, output = run.run()
    assert result is run.source
    own = output_of(run.source, run.text.inputs)
    np.testing.assert_allclose(double(output), own, rtol=1e-3, atol=1e-3)
    assert np.abs(own - wanted).max() > 1


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("count", [3, EXPERTS])
def test_not_finite_is_named(name: str, count: int) -> None:
    of = mixture()
    of.experts[name][4, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError) as caught:
        shrinking(count, of).run()
    assert (caught.value.expert, caught.value.projection) == (4, name)


# --- whose error -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loud", [1.0, 5.0])
def test_weights(loud: float) -> None:
    """1 over the root of a sequence's energy, with a mean square of 1."""
    run = shrinking(3, loud=loud)
    run.run()
    wanted = weights64(output_of(run.source, run.text.inputs))
    np.testing.assert_allclose(double(run.weight) ** 2, wanted / wanted.mean(), rtol=1e-4)


def test_one_expert_is_refitted_for_all_sequences_alike() -> None:
    """Its down is least squares with these weights, on outputs of which one sequence has nearly all the energy."""
    run = shrinking(1, loud=20.0, down="refit", ridge=1e-9)
    result, output = run.run()
    inputs = run.text.inputs
    unit = {**result.experts, "down_proj": torch.eye(HIDDEN, result.experts["down_proj"].shape[2])[None]}
    heard = output64(inputs, result.route(inputs), unit)[:, : result.experts["down_proj"].shape[2]]
    wanted = output_of(run.source, inputs)
    heavy = np.sqrt(weights64(wanted))[:, None]
    best = np.linalg.lstsq(heavy * heard, heavy * wanted, rcond=None)[0]
    assert error64(double(output), wanted) == pytest.approx(error64(heard @ best, wanted), rel=1e-3)
    unweighted = np.linalg.lstsq(heard, wanted, rcond=None)[0]
    assert error64(heard @ unweighted, wanted) > 1.1 * error64(heard @ best, wanted)


def test_moments_carry_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What merges the members, finds the groups and fits the rows sees gate values and errors times the weights."""
    seen: dict[str, np.ndarray] = {}
    gather, groups, fit = calibrated.gather, calibrated.groups_by_damage, calibrated.fit_router

    def gathered(experts, numbers, inputs, routing, *rest):
        seen["gather"] = gates64(routing, EXPERTS)
        return gather(experts, numbers, inputs, routing, *rest)

    def grouped(gram, gates, count):
        seen["groups"] = double(gates)
        return groups(gram, gates, count)

    def fitted(problem: RouterProblem, *rest):
        seen["fit"] = double(problem.products.energy)
        return fit(problem, *rest)

    for name, spy in (("gather", gathered), ("groups_by_damage", grouped), ("fit_router", fitted)):
        monkeypatch.setattr(calibrated, name, spy)
    run = shrinking(3, loud=5.0, **FITTED)
    run.run()
    wanted = output_of(run.source, run.text.inputs)
    weight = weights64(wanted) / weights64(wanted).mean()
    gates = gates64(run.text.routing, EXPERTS) * np.sqrt(weight)[:, None]
    np.testing.assert_allclose(seen["gather"], gates, rtol=1e-4)
    np.testing.assert_allclose(seen["groups"], gates, rtol=1e-4)
    np.testing.assert_allclose(seen["fit"], weight * (wanted**2).sum(1), rtol=1e-3)


@pytest.mark.parametrize("tokens", [FitSettings.router_tokens, 50])
def test_rows_are_checked_on_the_sequences_held_out(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on no others, also where only every fourth token is fitted on; errors are of the same tokens."""
    fit, masks = calibrated.fit_router, []

    def spy(problem: RouterProblem, *rest):
        inputs = problem.inputs
        assert len(inputs) <= tokens
        masks.append((inputs, problem.held_out, problem.products.energy))
        return fit(problem, *rest)

    monkeypatch.setattr(calibrated, "fit_router", spy)
    run = shrinking(3, loud=5.0, **FITTED)
    run.settings = FitSettings(router_tokens=tokens)
    run.run()
    energy = (double(run.weight)[:, None] * output_of(run.source, run.text.inputs)) ** 2
    held_out = {tuple(token) for token in run.text.inputs[-LENGTH:].tolist()}
    assert len(masks) == FitSettings.rounds
    for inputs, mask, found in masks:
        np.testing.assert_allclose(double(found), energy.sum(1)[:: len(energy) // len(inputs)], rtol=1e-3)
        assert mask.tolist() == [tuple(token) in held_out for token in inputs.tolist()]
        assert 0 < mask.sum() < len(mask)


def test_few_tokens_for_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only some tokens are asked about, gate values, weights and answers are of the same ones."""
    groups, seen = calibrated.groups_by_damage, {}

    def spy(gram, gates, count):
        seen.update(gram=double(gram), gates=double(gates))
        return groups(gram, gates, count)

    monkeypatch.setattr(calibrated, "groups_by_damage", spy)
    run = shrinking(3, loud=5.0, **PLAIN)
    run.settings = FitSettings(grouping_tokens=40)
    run.run()
    every = run.text.inputs[::4]
    wanted = double(run.weight)[::4, None] * gates64(run.source.route(every), EXPERTS)
    np.testing.assert_allclose(seen["gates"], wanted, rtol=1e-5)
    energy = np.einsum("tii->t", seen["gram"])
    alone = replace(run.source.route(every), index=torch.arange(EXPERTS).repeat(40, 1), value=torch.ones(40, EXPERTS))
    summed = output64(every, alone, dict(run.source.experts))
    np.testing.assert_allclose(seen["gram"].sum((1, 2)), (summed**2).sum(1), rtol=1e-3, atol=1e-3 * energy.mean())


def test_experts_that_are_zero() -> None:
    """Nothing to fit, nothing to divide by: zeros, with no error."""
    of = mixture()
    for name in PROJECTIONS:
        of.experts[name].zero_()
    run = shrinking(3, of, **FITTED)
    result, output = run.run()
    assert not output.any()
    assert all(not result.experts[name].any() for name in PROJECTIONS)
    assert result.router.isfinite().all()
    assert all(entry["error"] == 0 for entry in run.record["errors"])
    assert all(fit["before"] == fit["after"] == 0 for fit in run.record["fits"])


# --- fewer and narrower ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, EXPERTS])
@pytest.mark.parametrize("operator", ["merge", "keep"])
def test_experts_that_are_left_are_cut_like_those_of_a_layer(count: int, operator: str) -> None:
    """Gates and ups are rows of what was left before the cut, and downs are refitted to the tokens of the new rows."""
    how = {**PLAIN, "operator": operator}
    before, _ = shrinking(count, **how).run()
    run = shrinking(count, width=3, **how)
    result, output = run.run()
    assert [one["stage"] for one in run.record["errors"]] == ["merged", "narrowed"]
    assert run.stay is not None
    assert run.stay.shape == (count, 3)
    routing = before.route(run.text.inputs)
    for place, stay in enumerate(run.stay):
        assert torch.equal(result.experts.gate[place], before.experts.gate[place][stay])
        assert torch.equal(result.experts.up[place], before.experts.up[place][stay])
        token, gate = routing.of(place)
        z = (gate * run.weight[token])[:, None] * neurons(run.text.inputs[token], before.experts.expert(place), silu)
        down = refitted(ridged(z.T @ z), before.experts.down[place], stay)
        np.testing.assert_allclose(result.experts.down[place].numpy(), down.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.numpy(), output_of(result, run.text.inputs), rtol=1e-3, atol=1e-3)
    assert run.record["errors"][1]["error"] == pytest.approx(
        error64(output_of(result, run.text.inputs), double(run.target)), rel=1e-3
    )


def test_a_fit_comes_after_the_cut() -> None:
    run = shrinking(3, width=3, **WHOLE)
    result, _ = run.run()
    stages = {one["stage"]: one["error"] for one in run.record["errors"]}
    assert list(stages)[-2:] == ["narrowed", "layer"]
    assert stages["layer"] <= stages["narrowed"]
    assert result.experts.up.shape == (3, 3, HIDDEN)


# --- super experts ---------------------------------------------------------------------------------------------------


def with_super_expert(number: int, like: int) -> MoELayer:
    """Of which one expert has the gate and up of another, and outputs a thousand times as large."""
    of = mixture()
    for name in PROJECTIONS:
        of.experts[name][number].copy_(of.experts[name][like])
    of.experts.down[number].mul_(1000)
    of.router[number].copy_(of.router[like]).mul_(0.5)  # chosen with the other one, and for fewer tokens
    return of


@pytest.mark.parametrize(
    "how",
    [
        {"grouping": "weights"},
        {"grouping": "router"},
        {"grouping": "outputs"},
        {"grouping": "damage"},
        {"operator": "keep", "grouping": "none"},
        {"operator": "keep", "grouping": "weights"},
    ],
    ids=lambda how: "-".join(how.values()),
)
def test_a_super_expert_is_named_and_neither_merged_nor_dropped(how: dict) -> None:
    of = with_super_expert(1, like=4)
    run = shrinking(2, of, **PLAIN, **how)
    result, _ = run.run()
    assert run.record["super_experts"] == [1]
    assert run.record["peaks"][1] == max(run.record["peaks"])
    assert (1,) in run.groups
    place = run.groups.index((1,))
    assert all(torch.equal(result.experts[name][place], of.experts[name][1]) for name in PROJECTIONS)
    assert torch.equal(result.router[place], of.router[1])


def test_one_expert_is_left_for_the_others() -> None:
    run = shrinking(1, with_super_expert(1, like=4), **PLAIN)
    run.run()
    assert run.record["super_experts"] == [1]
    assert run.groups == ((0, 1, 2, 3, 4, 5),)


def test_usual_layers_have_no_super_expert() -> None:
    run = shrinking(3, **PLAIN)
    run.run()
    assert run.record["super_experts"] == []


@pytest.mark.parametrize("seed", range(4))
def test_the_neurons_of_a_super_experts_peak_stay(seed: int) -> None:
    """Whatever the choice: by chance a single neuron would seldom be one of them."""
    of = with_super_expert(1, like=4)
    whole, _ = shrinking(2, of, **PLAIN, grouping="weights").run()
    run = shrinking(2, of, **PLAIN, grouping="weights", width=1, neurons="random", seed=seed)
    run.run()
    place, inputs = run.groups.index((1,)), run.text.inputs
    token, _ = whole.route(inputs).of(place)
    peak = of_peak(neurons(inputs[token], of.experts.expert(1), silu), of.experts.down[1])
    assert run.stay is not None
    assert run.stay[place].tolist() == peak[:1].tolist()
