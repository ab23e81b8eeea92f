"""What a model is asked for while it generates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_balance_loss(model: Any) -> Iterator[None]:
    """The model without the auxiliary loss that ``output_router_logits: true`` in its configuration asks for.

    Only training reads that loss, and transformers' own classes fail at it in a pass that continues a cache.
    """
    config: Any = getattr(model, "config", None)
    asked = getattr(config, "output_router_logits", False)
    if asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            config.output_router_logits = asked
