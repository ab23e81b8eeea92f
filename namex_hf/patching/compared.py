"""How a patched model's routing differs from that of its linear router."""

from typing import Any

import torch

from ..calibration.decoder import BATCH_TOKENS
from ..merging.routers import comparison, overlap


@torch.no_grad()
def compared(block: Any, inputs: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """The record of a block of the patched class whose routing is not linear.

    Args:
        inputs: ``[tokens, hidden]``.
        ids: ``[tokens]``.
    """
    parts = [
        (block.gate(some)[2], block.route(some, of)[1])
        for some, of in zip(inputs.to(block.gate.weight).split(BATCH_TOKENS), ids.split(BATCH_TOKENS), strict=True)
    ]
    linear, chosen = (torch.cat(part) for part in zip(*parts, strict=True))
    record = comparison(linear, chosen, len(block.gate.weight))
    if block.routing == "cosine":
        return {**record, "scale": float(block.cosine_router.scale)}
    known = block.stable_router.assignment[ids, 0] >= 0
    on_known = float(overlap(linear[known], chosen[known]).mean()) if known.any() else None
    return {**record, "assigned": float(known.float().mean()), "agreement_assigned": on_known}
