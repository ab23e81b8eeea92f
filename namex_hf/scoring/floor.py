"""A mixture-of-experts model without its routed experts: the lower bound that a merge must exceed."""

from typing import Any

import torch


def without_routed_experts(model: Any) -> Any:
    """Set the output of all routed experts to zero, in place: attention, dense MLPs and shared experts remain.

    Args:
        model: a transformers model with fused experts (``experts.down_proj``).

    Raises:
        ValueError: it has no such experts.
    """
    names = [name for name, _ in model.named_parameters() if name.endswith(".experts.down_proj")]
    if not names:
        raise ValueError(f"{type(model).__name__} has no experts.down_proj")
    for name in names:
        torch.nn.init.zeros_(model.get_parameter(name))
    return model
