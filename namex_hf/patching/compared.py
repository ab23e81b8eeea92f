"""How a patched model's routing differs from that of its linear router."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..calibration.decoder import BATCH_TOKENS
from ..merging.routers import comparison, overlap
from ..models.routers import ChosenRouting
from ..scoring.compare import load
from ..scoring.perplexity import held_out_texts

WINDOW = 512


@torch.no_grad()
def compared(block: Any, inputs: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """The record of a block of the patched class whose routing is not linear.

    Args:
        inputs: ``[tokens, hidden]``.
        ids: ``[tokens]``.
    """
    parts = [
        (block.gate(some)[2], block.route(some, of)[1])
        for some, of in zip(inputs.to(block.gate.weight).split(BATCH_TOKENS), ids.split(BATCH_TOKENS), strict=True)
    ]
    linear, chosen = (torch.cat(part) for part in zip(*parts, strict=True))
    record = comparison(linear, chosen, len(block.gate.weight))
    if block.routing == "cosine":
        return {**record, "scale": float(block.cosine_router.scale)}
    known = block.stable_router.assignment[ids, 0] >= 0
    on_known = float(overlap(linear[known], chosen[known]).mean()) if known.any() else None
    return {**record, "assigned": float(known.float().mean()), "agreement_assigned": on_known}


@torch.no_grad()
def compared_on_held_out(folder: Path, tokens: int) -> list[dict[str, Any]]:
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
    for text in held_out_texts().values():
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0, :tokens]
        for window in ids.split(WINDOW):
            model(window[None], use_cache=False)
            read.append(window)
    return [compared(block, torch.cat(taken), torch.cat(read)) for block, taken in zip(blocks, inputs, strict=True)]
