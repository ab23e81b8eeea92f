"""What the routers of a model with ``routing: stable`` are asked in a pass, and what they answer."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...models.routers import StableRouter


class Heard(NamedTuple):
    """One layer's routing of one pass."""

    logits: torch.Tensor  # [tokens, experts], of the linear router
    linear: torch.Tensor  # [tokens, top_k], the experts that it chooses
    chosen: torch.Tensor  # [tokens, top_k], those that the tokens go to
    ids: torch.Tensor  # [tokens]


def stable_routers(model: nn.Module) -> list[StableRouter]:
    """Those of a model, by layer.

    Raises:
        ValueError: there is none.
    """
    found = [module for module in model.modules() if isinstance(module, StableRouter)]
    if not found:
        raise ValueError(f"{type(model).__name__} assigns no experts by token id; accepted: patched, routing: stable")
    return found


def listen(model: nn.Module, heard: list[Heard]) -> list[RemovableHandle]:
    """Append to `heard` what each layer's router hears, until the handles are removed."""

    def note(router: nn.Module, given: Any, answer: Any) -> None:
        logits, _, linear, ids = given
        heard.append(Heard(logits, linear, answer[1], ids.flatten()))

    return [router.register_forward_hook(note) for router in stable_routers(model)]
