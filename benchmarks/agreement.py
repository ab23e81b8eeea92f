"""How far experts assigned by token id are those that the linear router would choose in context."""

from typing import Any

import torch

from namex_hf.merging.routers import comparison
from namex_hf.training.stable_moe.routing_hooks import LayerRouting, record_routing, stable_routers
from namex_hf.training.stable_moe.student import Student


@torch.no_grad()
def agreement(
    model: Any, input_ids: torch.Tensor, student: Student | None = None, batch: int = 8
) -> list[dict[str, Any]]:
    """Per MoE layer, on text that the student has not learnt from, what the assignment has to do with the router.

    Both see the hidden states that the model has under the assignment.

    Args:
        model: after `freeze`, or patched on calibration text; it is left in the mode that it was in.
        input_ids: ``[sequences, length]``, without padding.
        student: that `freeze` gave back, to be asked about ids that it has not seen.
        batch: sequences a pass.

    Memory: the routers' logits of the whole text.

    Returns:
        ``assigned``, the share of tokens whose id has an assignment, and three times what
        `namex_hf.merging.routers.comparison` says: of these tokens in ``seen``; of all others in ``unseen``, where the
        student has no information: what it would have assigned without the fall-back to the router; and in ``all`` as
        the model routes, the fall-back included. None where there is no such token, or no student to ask.
    """
    heard = hear(model, input_ids.to(model.device), batch)
    assigned = stable_routers(model)[0].assignment[:, 0] >= 0  # the same ids in every layer
    known = assigned[heard[0].ids]
    own = None if student is None else student.choose(heard[0].ids[~known])
    found = []
    for layer, (logits, linear, chosen, _) in enumerate(heard):
        pairs = {
            "seen": (linear[known], chosen[known]),
            "unseen": None if own is None else (linear[~known], own[layer][:, : linear.shape[1]]),
            "all": (linear, chosen),
        }
        compared = {
            name: comparison(*pair, logits.shape[1]) if pair is not None and len(pair[0]) else None
            for name, pair in pairs.items()
        }
        found.append({"assigned": float(known.float().mean()), **compared})
    return found


@torch.no_grad()
def hear(model: Any, input_ids: torch.Tensor, batch: int) -> list[LayerRouting]:
    """What every layer's router hears in eval mode, all passes in one."""
    training, layers = model.training, len(stable_routers(model))
    heard: list[LayerRouting] = []
    handles = record_routing(model, heard)
    model.eval()
    try:
        for rows in input_ids.split(batch):
            model(input_ids=rows, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [LayerRouting(*map(torch.cat, zip(*heard[layer::layers], strict=True))) for layer in range(layers)]
