"""A trained curvature, put into the experts for good."""

from typing import Any

import torch

from ..models.configuration_namex import soft_choice
from ..models.soft import SoftRouting
from ..models.soft_kronecker import bent


@torch.no_grad()
def fold_curvature(model: Any) -> Any:
    """``E_i <- E_m + M_i(E_i - E_m)``: the same model under ``curvature: identity``, in place, and that one's speed.

    Equal to rounding, since M_i is no function of the input (NAMEx eq. 9). It can be trained on, saved and loaded, but
    the curvature cannot be had back.

    Args:
        model: with ``merge: soft`` and ``curvature: kronecker``; an adapter on experts, base expert or curvature has to
            be merged into it before.

    Memory: three times one layer's experts.

    Raises:
        ValueError: the model has no such curvature.
    """
    choice = soft_choice(model.config.namex)
    if choice is None or choice.curvature != "kronecker":
        found = "another merge" if choice is None else f"curvature '{choice.curvature}'"
        raise ValueError(f"found {found}; accepted: merge 'soft' with curvature 'kronecker'")
    for module in model.modules():
        if isinstance(module, SoftRouting):
            block: Any = module
            experts, base = block.experts, block.base(block.gate.weight)
            curvature = block.curvature(block.gate.weight)
            gate_up, down = bent(experts.gate_up_proj, experts.down_proj, base, curvature)
            experts.gate_up_proj.copy_(gate_up)
            experts.down_proj.copy_(down)
            block.curvature = None
    model.config.namex = {**model.config.namex, "curvature": "identity", "rank": None}
    return model
