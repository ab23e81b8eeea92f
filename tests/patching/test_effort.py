"""What a layer takes, against products that are counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from namex_hf.checkpoint.resolve import resolve
from namex_hf.merging.experts import ExpertWeights
from namex_hf.merging.gate import Gate
from namex_hf.merging.layer_fit import FitParameters, Problem
from namex_hf.merging.moe_layer import MoELayer, Text
from namex_hf.merging.narrow import Narrowing
from namex_hf.merging.routing import ROWS
from namex_hf.merging.settings import FitSettings
from namex_hf.patching import effort
from namex_hf.patching.effort import Effort, effort_of, measured_speed
from namex_hf.patching.estimate import space_needed
from namex_hf.patching.plan import Plan, make_plan
from namex_hf.recipe import Recipe

STEPS = 100
BATCH = FitSettings.batch


def plan_of(experts: int, fit: str = "layer") -> Plan:
    recipe = Recipe(merge="grouped", experts=experts, fit=fit, fit_steps=STEPS)
    return make_plan(resolve("tiny"), recipe, "5GB", reads_text=False)


@pytest.mark.parametrize("kept", [8, 2])
def test_operations_are_those_of_a_step(kept: int) -> None:
    """As torch counts them, but for the router's rows and for gradients of inputs, which nobody asks for."""
    plan = plan_of(kept)
    top_k, hidden, width = min(4, kept), plan.shape.hidden, plan.shape.width
    tokens = torch.randn(BATCH, hidden)
    matrices = ExpertWeights.of(lambda name: torch.randn(kept, *plan.shape.of(name)))
    wide = {True: (hidden, plan.shape.shared_width), False: (plan.shape.shared_width, hidden)}
    shared = {name: torch.randn(*wide[name == "down_proj"]) for name in matrices}
    layer = FitParameters.of(matrices, torch.randn(kept, hidden), shared, tokens)
    every = torch.zeros(BATCH, dtype=torch.bool)
    problem = Problem(tokens, tokens, torch.ones(BATCH), every, Gate(top_k), torch.nn.functional.silu)
    with FlopCounterMode(display=False) as forward:
        missed = problem.missed(torch.arange(BATCH), layer)
    with FlopCounterMode(display=False) as backward:
        missed.backward()
    rows = 2 * BATCH * kept * hidden
    products = 2 * BATCH * hidden * (top_k * width + plan.shape.shared_width)
    assert forward.get_total_flops() == 3 * products + rows
    assert backward.get_total_flops() == 4 * products + rows
    effort = effort_of(plan)
    assert effort is not None
    checks = FitSettings.checked_tokens / FitSettings.check_every / BATCH
    assert effort.operations == pytest.approx(STEPS * (7 + 3 * checks) * products)


@pytest.mark.parametrize("tokens", [0, 100])
def test_speed_is_that_of_products_of_as_many_rows(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without text only squares of matrices are multiplied, which is faster than a row at a time."""
    rows: list[int] = []

    def speed(device: str, tokens: int, *more: object) -> float:
        rows.append(tokens)
        return 1.0

    monkeypatch.setattr(effort, "measured_speed", speed)
    plan = make_plan(resolve("tiny"), Recipe(keep=0.5), "5GB", reads_text=False)
    monkeypatch.setattr(Plan, "tokens", tokens)
    Effort(1.0).seconds(plan)
    assert {*rows} == {25 if tokens else ROWS}


def test_padded_shared_experts_are_in_the_state_too() -> None:
    """Without a fit; where they are not padded they stay where they are."""
    for width, is_padded in ((48, True), (40, False)):
        plan = make_plan(resolve("tiny-deepseek"), Recipe(width=width, merge="narrow"), "5GB", reads_text=False)
        stored = sum(span.size for name, span in plan.spans.items() if ".mlp.shared_expert" in name)
        assert plan.shared_bytes == (stored + plan.padding_bytes if is_padded else 0)
        assert (plan.padding_bytes > 0) == is_padded


def test_room_for_the_shared_experts() -> None:
    """A fit of whole layers leaves them in the state folder too, until they are written."""
    plan = plan_of(8)
    stored = sum(span.size for name, span in plan.spans.items() if ".mlp.shared_expert" in name)
    assert space_needed(plan) - space_needed(plan_of(8, "router")) == stored > 0


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("neurons", ["second_order", "energy"])
def test_operations_are_those_of_a_cut(neurons: str, sweeps: int) -> None:
    """As torch counts them, but for the small products among neurons that go together, and for what is no product."""
    recipe = Recipe(keep=0.5, neurons=neurons, sweeps=sweeps, calibration_tokens=4096)
    plan = make_plan(resolve("tiny"), recipe, "5GB", reads_text=False)
    shape, tokens = plan.shape, 4096
    router, inputs = torch.randn(shape.experts, shape.hidden), torch.randn(tokens, shape.hidden)
    experts = ExpertWeights.of(lambda name: torch.randn(shape.experts, *shape.of(name)))
    layer = MoELayer(experts, router, Gate(shape.top_k), torch.nn.functional.silu)
    sequences = torch.zeros(8, dtype=torch.int64)
    text = Text(inputs, layer.route(inputs), sequences, sequences.bool())
    with FlopCounterMode(display=False) as counted:
        Narrowing(layer, text, plan.recipe.merge).run()
    effort = effort_of(plan)
    assert effort is not None
    each = 5 * 80 + 3 * 40 + sweeps * (2 * 80 + 3 * 40)
    assert effort.answers == pytest.approx(2 * tokens * shape.top_k * shape.hidden * each)
    assert counted.get_total_flops() == pytest.approx(effort.operations, rel=0.01 * (1 + sweeps))


def test_nothing_where_no_layer_is_fitted() -> None:
    assert effort_of(plan_of(8, "router")) is None
    assert effort_of(plan_of(16)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_speed_is_one(dtype: torch.dtype) -> None:
    assert 1e6 < measured_speed("cpu", 64, 80, 128, dtype) < 1e15


def test_seconds_are_operations_over_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def speed(*args: object) -> float:
        asked.append(args)
        return 100.0 if args[-1] == torch.bfloat16 else 10.0

    monkeypatch.setattr("namex_hf.patching.effort.measured_speed", speed)
    monkeypatch.setattr("namex_hf.patching.effort.multiplies_bfloat16", lambda kind: True)
    plan = plan_of(8)
    assert Effort(50.0, steps=2).seconds(plan) == 5
    assert Effort(50.0, answers=40.0).seconds(plan) == pytest.approx(1.4)
    assert asked[0][:4] == ("cpu", max(1, BATCH * 4 // 8), 80, 128)
