"""How close a model's next-token distributions are to its original's, on the same tokens."""

from typing import Any

import torch

from ..checkpoint.tokenizer import check_ids

CHUNK = 128
"""Tokens whose distributions are in memory in float32 at once."""


def acceptance_and_divergence(original: torch.Tensor, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token the sum over the vocabulary of min(p, q), and KL(p || q) in nats; float64 ``[tokens]`` both.

    The first is the chance that speculative decoding accepts a token that q drafts for p (Leviathan et al., 2023), and
    one less the total variation.

    Args:
        original, result: logits of p and q, ``[tokens, vocabulary]``, in any dtype.
    """
    accepted, diverged = [], []
    for p, q in zip(original.split(CHUNK), result.split(CHUNK), strict=True):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        accepted.append(torch.minimum(p, q).exp().sum(-1, dtype=torch.float64))
        diverged.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
    return torch.cat(accepted), torch.cat(diverged)


@torch.no_grad()
def window_closeness(original: Any, result: Any, tokens: torch.Tensor, window: int = 512) -> tuple[list[float], ...]:
    """`acceptance_and_divergence`, each as its mean over the tokens of every window.

    The windows are those of `window_losses`. Memory: both models, and their logits of one window.

    Args:
        original, result: causal language models of transformers with the same vocabulary, in eval mode.
        tokens: ``[n]`` ids.
    """
    window = min(window, len(tokens))
    for model in (original, result):
        check_ids(model, int(tokens.max()))
    found = []
    for ids in tokens[: len(tokens) // window * window].view(-1, 1, window):
        logits = [
            model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1].to(result.device)
            for model in (original, result)
        ]
        found.append([float(each.mean()) for each in acceptance_and_divergence(*logits)])
    return tuple(map(list, zip(*found, strict=True)))
