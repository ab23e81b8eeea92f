"""One group on its text: a common order, every way to weigh."""

import numpy as np
import pytest
import torch

from namex_hf.merging.alignment import permuted
from namex_hf.merging.members import merge_members
from namex_hf.merging.weightings import WEIGHTINGS
from tests.helpers.checkpoints import PROJECTIONS
from tests.helpers.groups import (
    ALIGN,
    CURVATURE,
    EXPERTS,
    INPUTS,
    RIDGE,
    ROUTING,
    every_way,
    group,
    merge,
    moments,
    tuning,
)
from tests.helpers.mixtures import WIDTH, draws, expert_at, random_experts
from tests.helpers.reference import double, gates64, saliency64, usage64

EVERY_WAY = every_way(
    weighting=tuple(WEIGHTINGS), point=("zero", "mean"), curvature=CURVATURE, power=("equal", "usage")
)


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
        if how.weights_by != "nash":
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
    experts = one.map(lambda matrix: matrix.repeat(EXPERTS, 1, 1))
    for how in EVERY_WAY:
        merged, record = merge_members(group(experts, align=align), how)
        for name in PROJECTIONS:
            torch.testing.assert_close(merged[name], one[name][0], rtol=2**-7, atol=1e-4)
        if how.weights_by == "uniform":
            assert all(game["weights"] == pytest.approx([1 / 3] * 3) for game in record)


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
