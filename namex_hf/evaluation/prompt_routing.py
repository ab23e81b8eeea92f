"""Continuations scored under ``routing_span: prompt``: the context alone routes them.

A pass over context and continuation together would route the continuation's later segments by its own tokens. Here the
context is a pass of its own, with a cache; what comes after a first pass goes through the one expert that the context's
routing makes (`soft`), as it does when the model generates.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..models.soft_cache import SoftCache


@torch.no_grad()
def prompt_log_probabilities(
    model: Any, requests: Sequence[tuple[Any, list[int], list[int]]], longest: int, device: torch.device
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation in nats, and whether it is the greedy one.

    Different continuations of one context share its pass.

    Args:
        model: with ``merge: soft`` and ``routing_span: prompt``.
        requests: anything, tokens of the context (at least one), tokens of the continuation (at least one).
        longest: tokens that the model takes; a longer context loses its beginning, as in lm-eval.
    """
    # The last token of a continuation is only ever looked for.
    cut = [(tuple(context[-(longest - len(rest) + 1) :]), rest) for _, context, rest in requests]
    contexts = list(dict.fromkeys(context for context, _ in cut))
    ids, real = _padded(contexts, left=True, device=device)
    cache = SoftCache(config=model.config)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    first = model(
        input_ids=ids, attention_mask=real, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits
    place = {context: row for row, context in enumerate(contexts)}
    owner = torch.tensor([place[context] for context, _ in cut], device=device)
    logits = first[owner]
    if any(len(rest) > 1 for _, rest in cut):
        cache.batch_select_indices(owner)
        ids, later = _padded([rest[:-1] for _, rest in cut], left=False, device=device)
        mask = torch.cat([real[owner], later], 1)
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        after = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        logits = torch.cat([logits, after], 1)
    return [_answer(row, rest) for row, (_, rest) in zip(logits, cut, strict=True)]


def _answer(logits: torch.Tensor, rest: list[int]) -> tuple[float, bool]:
    """Args: logits, ``[at least as many as the continuation has tokens, vocabulary]``, from its first token on."""
    targets = torch.tensor(rest, device=logits.device)
    logits = logits[: len(rest)]
    each = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(each.sum()), bool((logits.argmax(-1) == targets).all())


def _padded(rows: Sequence[Sequence[int]], left: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, ``[rows, longest]`` both."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        span = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, span], real[row, span] = torch.tensor(tokens, dtype=torch.long), 1
    return ids.to(device), real.to(device)
