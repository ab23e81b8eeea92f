"""What a mixture-of-experts model is without its routed experts: the floor that a merge has to beat."""

from typing import Any

import torch


def without_routed_experts(model: Any) -> Any:
    """The same model, in place, with routed experts that add nothing: attention and shared experts alone.

    Args:
        model: of transformers, with fused experts (``mlp.experts.down_proj``).

    Raises:
        ValueError: it has none.
    """
    names = [name for name, _ in model.named_parameters() if name.endswith("mlp.experts.down_proj")]
    if not names:
        raise ValueError(f"{type(model).__name__} has no mlp.experts.down_proj")
    for name in names:
        torch.nn.init.zeros_(model.get_parameter(name))
    return model
