"""Inputs and outputs of the routers of a model with ``routing: stable`` in a pass, recorded by hooks."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...models.routers import StableRouter


class LayerRouting(NamedTuple):
    """The routing of a layer in a pass."""

    logits: torch.Tensor  # [tokens, experts], of the linear router
    linear: torch.Tensor  # [tokens, top_k], the experts that the linear router chooses
    chosen: torch.Tensor  # [tokens, top_k], the experts that the tokens are sent to
    ids: torch.Tensor  # [tokens], the token ids


def stable_routers(model: nn.Module) -> list[StableRouter]:
    """The stable routers of a model, by layer.

    Raises:
        ValueError: the model has none.
    """
    routers = [module for module in model.modules() if isinstance(module, StableRouter)]
    if not routers:
        raise ValueError(f"{type(model).__name__} assigns no experts by token id; accepted: patched, routing: stable")
    return routers


def record_routing(model: nn.Module, routings: list[LayerRouting]) -> list[RemovableHandle]:
    """Append every layer's routing of a pass to `routings`, until the handles are removed."""

    def record(router: nn.Module, inputs: Any, outputs: Any) -> None:
        logits, _, linear, ids = inputs
        routings.append(LayerRouting(logits, linear, outputs[1], ids.flatten()))

    return [router.register_forward_hook(record) for router in stable_routers(model)]
