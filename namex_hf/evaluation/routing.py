"""How the routing of a patched folder differs from that of its linear router, on held-out text."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..models.routers import ChosenRouting
from ..patching.compared import compared
from .loading import load
from .perplexity import held_out_texts, text_ids

WINDOW = 512


@torch.no_grad()
def routing_on_held_out(folder: Path, tokens: int) -> list[dict[str, Any]]:
    """The record of every MoE layer of a patched folder on the packaged held-out text.

    Args:
        tokens: of each text, from its beginning.

    Memory: the model in float32, and its blocks' inputs for all of the text.
    """
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, ChosenRouting)]
    inputs: list[list[torch.Tensor]] = [[] for _ in blocks]
    for block, taken in zip(blocks, inputs, strict=True):
        block.register_forward_pre_hook(lambda _, given, taken=taken: taken.append(given[0].flatten(0, 1)))
    read = []
    for ids in text_ids(tokenizer, held_out_texts(), tokens).values():
        for window in ids.split(WINDOW):
            model(window[None], use_cache=False)
            read.append(window)
    return [compared(block, torch.cat(taken), torch.cat(read)) for block, taken in zip(blocks, inputs, strict=True)]
