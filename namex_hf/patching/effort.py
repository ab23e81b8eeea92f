"""How long a layer will take, known before it begins."""

import time
from dataclasses import dataclass
from functools import cache, partial

import torch

from ..merging.routing import ROWS, multiplies_bfloat16
from ..merging.settings import FitSettings
from ..recipe import Narrow
from .plan import Plan

FORWARD, BACKWARD = 3, 4  # products a token and expert: three matrices; their gradients, and that of the neurons
PROBED = 0.2  # seconds


@dataclass(frozen=True)
class Effort:
    """Of one layer: multiplications and additions in products of routed and shared experts. It is a lower bound, as it
    knows nothing of all that is no such product."""

    operations: float
    answers: float = 0.0  # of these, experts on tokens, in bfloat16 where experts are and the device is made for it
    steps: int = 0  # of a fit of the whole layer

    def seconds(self, plan: Plan) -> float:
        """At the speed that such products have here."""
        tokens, rows = FitSettings.batch if self.steps else plan.tokens, ROWS
        if tokens:  # else products are of squares alone
            rows = min(ROWS, max(1, tokens * min(plan.shape.top_k, plan.experts) // plan.experts))
        speed = partial(measured_speed, plan.recipe.device, rows, *plan.shape.of("up_proj"))
        dtype = plan.expert_dtype
        if dtype != torch.bfloat16 or not multiplies_bfloat16(plan.device):
            dtype = torch.float32
        return self.answers / speed(dtype) + (self.operations - self.answers) / speed(torch.float32)


def effort_of(plan: Plan) -> Effort | None:
    """None where no layer is fitted whole or narrowed."""
    if (plan.experts, plan.width) == (plan.shape.experts, plan.shape.width):
        return None
    if plan.fits == "layer":
        return _of_fit(plan)
    return _of_cut(plan) if isinstance(plan.recipe.merge, Narrow) else None


def _of_fit(plan: Plan) -> Effort:
    shape, steps = plan.shape, plan.fit.steps
    checked = min(FitSettings.checked_tokens, plan.tokens // 8) / FitSettings.check_every
    products = steps * ((FORWARD + BACKWARD) * FitSettings.batch + FORWARD * checked)
    neurons = plan.width * min(shape.top_k, plan.experts) + shape.shared_width  # of a token
    return Effort(2.0 * shape.hidden * neurons * products, steps=steps)


def _of_cut(plan: Plan) -> Effort:
    """Outputs before and after, neurons and their moments on each expert's tokens; then which go, and new downs."""
    shape, width, merge = plan.shape, plan.width, plan.recipe.merge
    assert isinstance(merge, Narrow)
    hidden, before = shape.hidden, shape.width
    received = plan.tokens * shape.top_k
    answers = 2.0 * received * hidden * (FORWARD * (before + width) + 2 * before)
    moments = 2.0 * received * before**2
    chosen = 2.0 * before**2 * (hidden + 3 * (before - width)) if merge.neurons == "second_order" else 0.0
    refitted = 2.0 * hidden * before * width
    operations = answers + moments + shape.experts * (chosen + refitted)
    swept = 2.0 * received * hidden * (FORWARD * width + 2 * before)  # outputs so far, and neurons again
    missing = 2.0 * received * hidden * (2 * width + before)  # of the output, without an expert and with it
    sweeps = merge.sweeps or 0
    operations += sweeps * (swept + missing + 2 * moments + shape.experts * (chosen + refitted))
    return Effort(operations, answers + sweeps * swept)


@cache
def measured_speed(device: str, tokens: int, rows: int, columns: int, dtype: torch.dtype) -> float:
    """Operations a second in products of one expert's tokens with one of its matrices.

    Args:
        rows, columns: of the matrix.
    """
    left = torch.ones(tokens, columns, device=device, dtype=dtype)
    right = torch.ones(columns, rows, device=device, dtype=dtype)
    float((left @ right)[0, 0])  # the first product is slower, and a device answers when it is asked for a number
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < PROBED:
        float((left @ right)[0, 0])
        count += 1
    return 2.0 * tokens * rows * columns * count / spent
