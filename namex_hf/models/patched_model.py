"""Methods that the patched models of all families share."""

from typing import Any

import torch
from torch import nn

from .routers import CosineRouter, StableRouter
from .soft_curvature import CalibratedCurvature
from .soft_kronecker import KroneckerProducts


class PatchedModel:
    """Mixin for a pretrained model."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The base expert consists of nn.Linear modules, which the family's own method initialises.
        super()._init_weights(module)
        if isinstance(module, (CosineRouter, StableRouter, CalibratedCurvature, KroneckerProducts)):
            module.reset_parameters()

    def resize_token_embeddings(self: Any, *args, **kwargs):
        """As the stock model's; routers with a table of token ids are resized too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, StableRouter):
                module.resize(self.config.vocab_size)
        return embeddings


__all__ = ["PatchedModel"]
