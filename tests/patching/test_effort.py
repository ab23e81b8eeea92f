"""What a fit of whole layers takes, against products that are counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from namex_hf.checkpoint.resolve import resolve
from namex_hf.merging.experts import ExpertWeights
from namex_hf.merging.gate import Gate
from namex_hf.merging.layer_fit import FitParameters, Problem
from namex_hf.merging.settings import FitSettings
from namex_hf.patching.effort import effort_of, measured_speed
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
    assert effort.seconds(effort.operations / 5) == pytest.approx(5)


def test_room_for_the_shared_experts() -> None:
    """A fit of whole layers leaves them in the state folder too, until they are written."""
    plan = plan_of(8)
    stored = sum(span.size for name, span in plan.spans.items() if ".mlp.shared_expert" in name)
    assert space_needed(plan) - space_needed(plan_of(8, "router")) == stored > 0


def test_nothing_where_no_layer_is_fitted() -> None:
    assert effort_of(plan_of(8, "router")) is None
    assert effort_of(plan_of(16)) is None


def test_the_speed_is_one() -> None:
    assert 1e6 < measured_speed(plan_of(8)) < 1e15
