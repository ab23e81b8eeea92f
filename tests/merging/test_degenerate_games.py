"""Games without agreement on the way of the base expert: the step, what is recorded, and what later layers reuse."""

from typing import Any

import pytest
import torch

from namex_hf.merging.experts import PROJECTIONS, ExpertWeights
from namex_hf.merging.propagation import PropagationState, PropagationStep, propagate
from namex_hf.recipe import Recipe
from tests.helpers.mixtures import weights_of

E1, E2, E3 = torch.eye(3).view(3, 1, 3)
OPPOSED = (E1, -E1, E2)
"""0 lies between the first two, so these three cannot agree; their plain mean is a third of `E2`."""
BASE = ExpertWeights(*(torch.full((1, 3), float(index)) for index in (2, 3, 4)))


def at_right_angles(*lengths: float) -> tuple[torch.Tensor, ...]:
    """Weights on the simplex are then proportional to 1 / length."""
    return tuple(length * one for length, one in zip(lengths, (E1, E2, E3), strict=True))


def pass_layer(
    walk: PropagationState, position: int, taus: dict[str, tuple[torch.Tensor, ...]], **choice: Any
) -> PropagationStep:
    experts = weights_of({name: torch.stack([walk.base[name] + tau for tau in taus[name]]) for name in PROJECTIONS})
    return propagate(experts, walk, Recipe(**choice).merge, position)


def alike(tau: tuple[torch.Tensor, ...]) -> dict[str, tuple[torch.Tensor, ...]]:
    return dict.fromkeys(PROJECTIONS, tau)


def statuses(step: PropagationStep) -> list[str]:
    return [game["status"] for game in step.record]


@pytest.mark.parametrize("granularity", ["matrix", "expert"])
@pytest.mark.parametrize(
    ("point", "share", "status"), [("zero", 0.0, "no_agreement"), ("mean", 1 / 3, "uniform_fallback")]
)
def test_two_opposed_experts(granularity: str, point: str, share: float, status: str) -> None:
    """Zero point: no step. The mean: the plain mean's step, from which the third expert gains."""
    rules = {"disagreement": point, "granularity": granularity, "scale": "lemma"}  # the scale changes no fallback
    step = pass_layer(PropagationState(BASE), 0, alike(OPPOSED), **rules, gamma=0.6)
    assert set(statuses(step)) == {status}
    for game in step.record:
        assert game["weights"] == pytest.approx([share] * 3)
    assert not step.state.weights.any()
    assert step.weights.tolist() == [game["weights"] for game in step.record]
    for name in PROJECTIONS:
        torch.testing.assert_close(step.state.base[name], BASE[name] + 0.6 * share * E2)


@pytest.mark.parametrize(
    ("point", "share", "status"), [("zero", 0.0, "no_agreement"), ("mean", 1 / 3, "uniform_fallback")]
)
def test_each_game_is_decided_by_itself(point: str, share: float, status: str) -> None:
    """NAMEx: gate has no agreement before the third layer, and is solved until then; up and down reuse the first's."""
    choice: dict[str, Any] = {"method": "namex"}
    first = {**alike(at_right_angles(1, 2, 4)), "gate_proj": OPPOSED}
    if point == "mean":  # at the mean point only games whose players are alike have round weights
        choice["disagreement"] = "mean"
        first |= alike(at_right_angles(2, 2, 2)) | {"gate_proj": OPPOSED}
    wanted = [4 / 7, 2 / 7, 1 / 7] if point == "zero" else [1 / 3] * 3

    step = pass_layer(PropagationState(BASE), 0, first, **choice)
    assert statuses(step) == [status, "agreement", "agreement"]
    assert step.weights[0].tolist() == pytest.approx([share] * 3)
    assert step.weights[1].tolist() == pytest.approx(wanted)

    step = pass_layer(step.state, 1, {**alike(at_right_angles(3, 1, 1)), "gate_proj": OPPOSED}, **choice)
    assert statuses(step) == [status, "reused", "reused"]
    assert step.weights[0].tolist() == pytest.approx([share] * 3)
    assert step.weights[1].tolist() == pytest.approx(wanted)

    step = pass_layer(step.state, 2, alike(at_right_angles(5, 5, 5)), **choice)
    assert statuses(step) == ["agreement", "reused", "reused"]
    before = step.state
    step = pass_layer(before, 3, alike(at_right_angles(7, 1, 1)), **choice)
    assert statuses(step) == ["reused"] * 3
    assert step.weights[0].tolist() == pytest.approx([1 / 3] * 3)
    moved = torch.tensor([7.0, 1, 1]) * torch.tensor([[1 / 3] * 3, wanted, wanted])
    for name, wanted_move in zip(PROJECTIONS, moved, strict=True):
        torch.testing.assert_close(step.state.base[name], before.base[name] + wanted_move)


@pytest.mark.parametrize(("point", "status"), [("zero", "no_agreement"), ("mean", "uniform_fallback")])
def test_an_older_agreement_is_not_reused_after_a_game_without(point: str, status: str) -> None:
    """``every: 2``: the third layer has no agreement, so the fourth is solved and does not go back to the first's."""
    walk, found = PropagationState(BASE), []
    layers = [at_right_angles(1, 2, 4), at_right_angles(1, 1, 1), OPPOSED, at_right_angles(2, 2, 2)]
    for position, tau in enumerate(layers):
        step = pass_layer(walk, position, alike(tau), disagreement=point, every=2)
        walk = step.state
        found.append(statuses(step))
    assert found == [["agreement"] * 3, ["reused"] * 3, [status] * 3, ["agreement"] * 3]
    assert step.weights.flatten().tolist() == pytest.approx([1 / 3] * 9)


def test_momentum_goes_on_without_agreement() -> None:
    """mu = 0.5 mu: half of the first step again, where the second layer adds nothing."""
    first = pass_layer(PropagationState(BASE), 0, alike(at_right_angles(1, 1, 1)), momentum="complex", beta="0.5")
    second = pass_layer(first.state, 1, alike(OPPOSED), momentum="complex", beta="0.5")
    assert statuses(second) == ["no_agreement"] * 3
    for name in PROJECTIONS:
        torch.testing.assert_close(second.state.base[name], BASE[name] + 1.5 * (E1 + E2 + E3) / 3)
