"""Configuration of a model during generation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_balance_loss(model: Any) -> Iterator[None]:
    """Inside this context the model computes no auxiliary loss, also under ``output_router_logits: true``.

    Only training reads that loss, and transformers' own classes fail to compute it in a pass that continues a cache.
    """
    config: Any = getattr(model, "config", None)
    setting = getattr(config, "output_router_logits", False)
    if setting:
        config.output_router_logits = False
    try:
        yield
    finally:
        if setting:
            config.output_router_logits = setting
