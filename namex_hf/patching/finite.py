"""Tensors that are carried over as bytes are looked at all the same: a checkpoint with NaN in it is refused."""

from collections.abc import Callable

import torch

from ..checkpoint.bytes import Reader
from ..checkpoint.header import TensorSpan
from ..errors import CheckpointError
from ..families import PROJECTIONS
from .plan import Plan


def check_finite(plan: Plan, advance: Callable[[str, int], None]) -> None:
    """Read every floating tensor that is no routed expert's (those are checked where they are merged).

    Memory: one tensor at a time.

    Raises:
        CheckpointError: naming the tensor.
    """
    experts = {
        plan.family.expert(layer, expert, projection)
        for layer in plan.shape.layers
        for expert in range(plan.shape.experts)
        for projection in PROJECTIONS
    }
    with Reader(plan.checkpoint.identity.digests) as reader:
        for name, span in plan.spans.items():
            if name in experts and (plan.recipe.has_base or plan.recipe.calibrated or plan.recipe.merge == "grouped"):
                continue
            if span.dtype.is_floating_point and span.dtype.itemsize > 1:
                require_finite(name, span, reader.read(span))
            advance("checking", span.size)


def require_finite(name: str, span: TensorSpan, tensor: torch.Tensor) -> None:
    # The extremes carry NaN and infinity, and are found thirty times faster than by isfinite on bfloat16.
    if tensor.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
        raise CheckpointError(f"tensor {name} in {span.file.name} holds NaN or infinite values")
