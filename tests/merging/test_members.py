"""One group on its text: a common order, every way to weigh, the bargain over losses against a general optimiser."""

from itertools import product

import numpy as np
import pytest
import torch
from float64_reference import double
from scipy.optimize import minimize
from small_mixtures import (
    PROJECTIONS,
    WIDTH,
    draws,
    expert_at,
    gates64,
    neurons64,
    random_experts,
    random_routing,
    random_tokens,
    saliency64,
    usage64,
)
from torch.nn.functional import silu

from namex_hf.merging.alignment import permuted
from namex_hf.merging.combine import Combination
from namex_hf.merging.members import Members, Tuning, by_losses, gather, merge_members
from namex_hf.merging.routing import Routing
from namex_hf.merging.weightings import WEIGHTINGS, Bargain, Seen

EXPERTS, TOKENS = 6, 120
INPUTS, ROUTING = random_tokens(TOKENS, 0), random_routing(TOKENS, EXPERTS, 2, 0)
RIDGE = 0.1
ALIGN, CURVATURE, POWER = (
    ("none", "weights", "activations"),
    ("identity", "diagonal", "calibrated"),
    ("equal", "usage", "loss"),
)


def group(experts, numbers=(4, 1, 2), align: str = "none", routing: Routing = ROUTING, inputs=INPUTS) -> Members:
    count = len(experts["gate_proj"])
    usage, saliency = usage64(routing, count), saliency64(INPUTS, routing, experts)
    seen = Seen(*(torch.from_numpy(amount[list(numbers)]) for amount in (usage, saliency)))
    return gather(experts, numbers, inputs, routing, silu, align, seen)


def tuning(weighting: str = "nash", point: str = "zero", **choices) -> Tuning:
    power = "usage" if choices.get("power") == "usage" else "equal"
    return Tuning(Combination(weighting, Bargain(point, power=power)), ridge=RIDGE, **choices)


def merge(members: Members, how: Tuning) -> dict[str, torch.Tensor]:
    return merge_members(members, how)[0]


EVERY_WAY = [
    tuning(weighting, point, curvature=curvature, metric=metric, power=power)
    for weighting, point, curvature, metric, power in product(
        WEIGHTINGS, ("zero", "mean"), CURVATURE, ("euclidean", "calibrated"), POWER
    )
    if metric == "calibrated" or power != "loss"
]


# --- a common order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ALIGN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather(align: str, dtype: torch.dtype) -> None:
    """The first as it is, the others with their neurons in another order, or none; the layer is left alone."""
    experts = random_experts(EXPERTS, 0, dtype)
    before = {name: matrix.clone() for name, matrix in experts.items()}
    members = group(experts, (4, 1, 2), align)
    assert members.numbers == (4, 1, 2)
    for name in PROJECTIONS:
        assert members.matrices[name].dtype == dtype
        assert torch.equal(members.matrices[name][0], experts[name][4])
        assert torch.equal(experts[name], before[name])
        columns = name == "down_proj"
        neurons = (one.mT if columns else one for one in (members.matrices[name][1:], experts[name][[1, 2]]))
        found, given = (one[..., 0].sort(dim=1).values for one in neurons)
        assert torch.equal(found, given)
    moved = not torch.equal(members.matrices["up_proj"][1:], experts["up_proj"][[1, 2]])
    assert moved == (align != "none")


@pytest.mark.parametrize("align", ["weights", "activations"])
@pytest.mark.parametrize("curvature", CURVATURE)
def test_permuted_copies_merge_to_the_original(align: str, curvature: str) -> None:
    """Of one expert, in the order of the first of the group; without alignment they do not."""
    experts = random_experts(EXPERTS, 0)
    for number in (1, 2):
        copy = permuted(expert_at(experts, 4), torch.randperm(WIDTH, generator=draws(number)))
        for name in PROJECTIONS:
            experts[name][number] = copy[name]
    merged, apart = (merge(group(experts, align=how), tuning(curvature=curvature)) for how in (align, "none"))
    for name in PROJECTIONS:
        torch.testing.assert_close(merged[name], experts[name][4], rtol=1e-3, atol=1e-3)
        assert (apart[name] - experts[name][4]).abs().max() > 0.1


def test_activations_are_those_of_the_group_s_own_tokens() -> None:
    """What the layer's other tokens would say does not matter, however loud."""
    gates = gates64(ROUTING, EXPERTS)
    own = torch.from_numpy((gates[:, [4, 1, 2]] > 0).any(1))
    loud = torch.where(own[:, None], INPUTS, 100 * INPUTS)
    for seed in range(5):
        experts = random_experts(EXPERTS, seed)
        one, other = (group(experts, align="activations", inputs=x) for x in (INPUTS, loud))
        assert all(torch.equal(one.matrices[name], other.matrices[name]) for name in PROJECTIONS)


@pytest.mark.parametrize("align", ALIGN)
def test_a_group_without_tokens(align: str) -> None:
    """It has nothing to correlate, and merges to the plain mean where weights or usage would say more."""
    experts = random_experts(EXPERTS + 3, 0)
    for how in EVERY_WAY:
        members = group(experts, (7, 6, 8), align)
        merged = merge(members, how)
        assert all(matrix.isfinite().all() for matrix in merged.values())
        if how.combination.weighting != "nash" or how.metric == "calibrated":
            for name in PROJECTIONS:
                torch.testing.assert_close(merged[name], members.matrices[name].mean(0), rtol=1e-4, atol=1e-5)


# --- every way to weigh ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ALIGN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way(align: str, dtype: torch.dtype) -> None:
    """Finite, of the experts' dtype and shape; weights on the simplex, one game a matrix."""
    experts = random_experts(EXPERTS, 0, dtype)
    for how in EVERY_WAY:
        merged, record = merge_members(group(experts, align=align), how)
        assert [game["projections"] for game in record] == [[name] for name in PROJECTIONS]
        for game in record:
            assert sum(game["weights"]) == pytest.approx(1)
            assert min(game["weights"]) > 0
        for name in PROJECTIONS:
            assert merged[name].dtype == dtype
            assert merged[name].shape == experts[name][0].shape
            assert merged[name].isfinite().all()


@pytest.mark.parametrize("align", ALIGN)
def test_equal_experts_merge_to_themselves(align: str) -> None:
    one = random_experts(1, 0, torch.bfloat16)
    experts = {name: matrix.repeat(EXPERTS, 1, 1) for name, matrix in one.items()}
    for how in EVERY_WAY:
        merged, record = merge_members(group(experts, align=align), how)
        for name in PROJECTIONS:
            torch.testing.assert_close(merged[name], one[name][0], rtol=2**-7, atol=1e-4)
        if how.metric == "calibrated" or how.combination.weighting == "uniform":
            assert all(game["weights"] == pytest.approx([1 / 3] * 3) for game in record)


def moments(members: Members) -> dict[str, list[np.ndarray]]:
    """By projection and member ``sum_t g_t^2 x_t x_t^T`` over its tokens, from dense gate values."""
    gates, result = gates64(members.routing, EXPERTS), {}
    for name in PROJECTIONS:
        result[name] = []
        for place, number in enumerate(members.numbers):
            one = {key: members.matrices[key][place] for key in PROJECTIONS}
            seen = neurons64(INPUTS, one) if name == "down_proj" else double(INPUTS)
            result[name].append(np.einsum("t,ti,tj->ij", gates[:, number] ** 2, seen, seen))
    return result


@pytest.mark.parametrize("curvature", CURVATURE)
@pytest.mark.parametrize("weighting", ["uniform", "usage", "saliency", "nash"])
def test_merged_under_its_curvature(curvature: str, weighting: str) -> None:
    """``(sum w_i E_i C_i)(sum w_i C_i)^-1`` with the weights of the record and C_i of the aligned neurons."""
    experts = random_experts(EXPERTS, 0)
    members = group(experts, align="weights")
    merged, record = merge_members(members, tuning(weighting, curvature=curvature))
    usage, saliency = (
        all_of[[4, 1, 2]] for all_of in (usage64(ROUTING, EXPERTS), saliency64(INPUTS, ROUTING, experts))
    )
    expected = {"uniform": np.ones(3) / 3, "usage": usage / usage.sum(), "saliency": saliency / saliency.sum()}
    for name, game in zip(PROJECTIONS, record, strict=True):
        np.testing.assert_allclose(game["weights"], expected.get(weighting, game["weights"]), rtol=1e-12)
        top = bottom = 0
        for weight, matrix, moment in zip(
            game["weights"], double(members.matrices[name]), moments(members)[name], strict=True
        ):
            full = moment + RIDGE * np.trace(moment) / len(moment) * np.eye(len(moment))
            curved = {"identity": np.eye(len(full)), "diagonal": np.diag(np.diag(full)), "calibrated": full}[curvature]
            top, bottom = top + weight * matrix @ curved, bottom + weight * curved
        np.testing.assert_allclose(double(merged[name]), top @ np.linalg.inv(bottom), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("power", ["equal", "usage"])
def test_power_in_the_game_over_weights(power: str) -> None:
    """a (K a) = p for all players but the first, who has no stake and keeps 1/n."""
    members = group(random_experts(EXPERTS, 0), (4, 1, 2, 0))
    usage = usage64(ROUTING, EXPERTS)[[1, 2, 0]]
    _, record = merge_members(members, tuning(power=power, curvature="identity"))
    for name, game in zip(PROJECTIONS, record, strict=True):
        matrices = double(members.matrices[name]).reshape(4, -1)
        tau = matrices[1:] - matrices[0]
        assert game["weights"][0] == pytest.approx(1 / 4)
        weights = np.array(game["weights"][1:])
        heard = weights * (tau @ tau.T @ weights) / (usage if power == "usage" else 1)
        np.testing.assert_allclose(heard, heard[0], rtol=1e-4)


# --- the bargain over losses -----------------------------------------------------------------------------------------


def curved_mean(weights, matrices, curved) -> np.ndarray:
    top = np.einsum("n,nrc,ncd->rd", weights, matrices, curved)
    return top @ np.linalg.inv(np.einsum("n,ncd->cd", weights, curved))


def losses(matrix, matrices, curved) -> np.ndarray:
    return np.einsum("nrc,ncd,nrd->n", matrix - matrices, curved, matrix - matrices)


def bargained(matrices, curved, point, power) -> np.ndarray:
    """Weights p / gain, summing to 1, where W of that form makes sum p log gain largest: Nelder-Mead over log w."""
    before = losses(point, matrices, curved)

    def gains(logs: np.ndarray) -> np.ndarray:
        return 1 - losses(curved_mean(np.exp(logs), matrices, curved), matrices, curved) / before

    def welfare(logs: np.ndarray) -> float:
        gain = gains(logs)
        return 1e6 * (1 - gain.min()) if gain.min() <= 0 else -float(power @ np.log(gain))

    best = -np.log(before)
    for _ in range(4):
        options = {"xatol": 1e-10, "fatol": 1e-13, "maxiter": 4000, "maxfev": 4000}
        best = minimize(welfare, best, method="Nelder-Mead", options=options).x
    weights = power / (gains(best) * before)
    return weights / weights.sum()


@pytest.mark.parametrize("power", POWER)
@pytest.mark.parametrize("point", ["zero", "mean"])
def test_losses_against_a_general_optimiser(point: str, power: str) -> None:
    """With the zero point the first has no stake and keeps 1/n; the others share the rest."""
    members = group(random_experts(EXPERTS, 0), (4, 1, 2, 0))
    weights, record = by_losses(members, tuning(point=point, metric="calibrated", power=power))
    usage = usage64(ROUTING, EXPERTS)[[4, 1, 2, 0]]
    playing = slice(1 if point == "zero" else 0, None)
    for name, game in zip(PROJECTIONS, record, strict=True):
        matrices, plain = double(members.matrices[name]), np.stack(moments(members)[name])
        ridge = RIDGE * np.einsum("ncc->n", plain) / plain.shape[-1]
        start = matrices[0] if point == "zero" else matrices.mean(0)
        powers = {"equal": np.ones(4), "usage": usage, "loss": losses(start, matrices, plain)}[power][playing]
        curved = plain + ridge[:, None, None] * np.eye(plain.shape[-1])
        wanted = bargained(matrices[playing], curved[playing], start, powers / powers.mean())
        after = curved_mean(wanted, matrices[playing], curved[playing])
        np.testing.assert_allclose(game["losses_before"], losses(start, matrices, curved), rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(game["losses_after"], losses(after, matrices, curved), rtol=1e-2)
        if point == "zero":
            wanted = np.array([0.25, *(0.75 * wanted)])
        np.testing.assert_allclose(weights[name].numpy(), wanted, rtol=1e-3)
        assert game["weights"] == weights[name].tolist()
        assert game["spread"] == pytest.approx(wanted.std() / wanted.mean(), rel=1e-2)
        assert game["status"] == "agreement"
        assert game["projections"] == [name]


def test_losses_without_agreement() -> None:
    """Two on opposite sides of the first: all weigh alike, and the record says why."""
    experts = random_experts(EXPERTS, 0)
    for name in PROJECTIONS:
        experts[name][2] = 2 * experts[name][4] - experts[name][1]
    routing = Routing(torch.tensor([[1, 2, 4]]).repeat(TOKENS, 1), torch.ones(TOKENS, 3))
    weights, record = by_losses(group(experts, routing=routing), tuning(metric="calibrated"))
    for name, game in zip(PROJECTIONS[:2], record[:2], strict=True):  # downs see inputs of their own
        assert game["status"] == "no_agreement"
        assert weights[name].tolist() == pytest.approx([1 / 3] * 3)
    assert [game["projections"] for game in record] == [[name] for name in PROJECTIONS]


def test_change_that_no_token_sees() -> None:
    """Power by loss where rounding could make the loss of one that loses nothing negative."""
    for seed in range(20):
        experts, routing = random_experts(EXPERTS, seed), random_routing(TOKENS, EXPERTS, 2, seed)
        few = Routing(torch.where(routing.index == 1, 0, routing.index), routing.value)
        few.index[0, 0] = 1
        seen = INPUTS[0].double()
        for name in ("gate_proj", "up_proj"):
            change = torch.randn(WIDTH, len(seen), dtype=torch.float64, generator=draws(seed))
            change -= torch.outer(change @ seen, seen) / seen.square().sum()
            experts[name][1] = experts[name][4] + change
        merged = merge(group(experts, (4, 1), routing=few), tuning(metric="calibrated", power="loss"))
        assert all(matrix.isfinite().all() for matrix in merged.values())
