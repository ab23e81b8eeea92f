"""Folding of a trained curvature into the experts."""

from typing import Any

import torch

from ..models.configuration_namex import soft_choice
from ..models.soft import SoftRouting
from ..models.soft_kronecker import bent


@torch.no_grad()
def fold_curvature(model: Any) -> Any:
    """``E_i <- E_m + M_i(E_i - E_m)``, in place: the same model with ``curvature: identity``, and its speed.

    Equal up to rounding, because M_i does not depend on the input (NAMEx eq. 9). The result can be trained, saved and
    loaded, but the curvature cannot be recovered.

    Args:
        model: with ``merge: soft`` and ``curvature: kronecker``. An adapter on experts, base expert or curvature must
            be merged first.

    Memory: three times the experts of a layer.

    Raises:
        ValueError: the model has no such curvature.
    """
    choice = soft_choice(model.config.namex)
    if choice is None or choice.curvature != "kronecker":
        value = "another merge" if choice is None else f"curvature '{choice.curvature}'"
        raise ValueError(f"found {value}; accepted: merge 'soft' with curvature 'kronecker'")
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
