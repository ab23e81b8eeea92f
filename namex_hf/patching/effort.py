"""What a fit of whole layers takes, known before it begins."""

import time
from dataclasses import dataclass

import torch

from ..merging.settings import FitSettings
from .plan import Plan

FORWARD, BACKWARD = 3, 4  # products a token and expert: three matrices; their gradients, and that of the neurons
PROBED = 0.2  # seconds


@dataclass(frozen=True)
class Effort:
    """Of fitting one layer."""

    steps: int
    operations: float  # multiplications and additions in the products of routed and shared experts

    def seconds(self, speed: float) -> float:
        """At ``speed`` operations a second: a lower bound, as it knows nothing of all that is no product."""
        return self.operations / speed


def effort_of(plan: Plan) -> Effort | None:
    """None where no layer is fitted whole."""
    shape = plan.shape
    if plan.fits != "layer" or (plan.experts, plan.width) == (shape.experts, shape.width):
        return None
    steps = plan.fit.steps
    checked = min(FitSettings.checked_tokens, plan.recipe.calibration.tokens // 8) / FitSettings.check_every
    products = steps * ((FORWARD + BACKWARD) * FitSettings.batch + FORWARD * checked)
    neurons = plan.width * min(shape.top_k, plan.experts) + shape.shared_width  # of a token
    return Effort(steps, 2.0 * shape.hidden * neurons * products)


def measured_speed(plan: Plan) -> float:
    """Operations a second in products of the size that one expert's tokens have in a step, on the recipe's device."""
    rows, columns = plan.shape.of("gate_proj")
    tokens = max(1, FitSettings.batch * min(plan.shape.top_k, plan.experts) // plan.experts)
    left = torch.ones(tokens, columns, device=plan.recipe.device)
    right = torch.ones(columns, rows, device=plan.recipe.device)
    float((left @ right)[0, 0])  # the first product is slower, and a device answers when it is asked for a number
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < PROBED:
        float((left @ right)[0, 0])
        count += 1
    return 2.0 * tokens * rows * columns * count / spent
