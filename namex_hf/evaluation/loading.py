"""Models as they are measured: their dtype, a tokenizer that fills batches, and without parts that do not count."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .. import models  # noqa: F401  (registers the classes that the folders need)
from ..checkpoint.tokenizer import open_tokenizer
from ..models.loading import without_bar


def load(folder: str | Path, dtype: Any = torch.float32) -> Any:
    """A model on the CPU. Args: dtype, ``auto`` for that in which it is stored."""
    with without_bar():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a folder, with a token that fills batches. No remote code is run.

    Raises:
        CheckpointError: none that transformers can open.
    """
    tokenizer = open_tokenizer(folder, str(folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
