"""Perplexity of a causal language model over text."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.tokenizer import check_ids

HELD_OUT = Path(__file__).parent.parent / "packaged" / "held_out"


def held_out_texts() -> dict[str, str]:
    """The packaged held-out text of every domain, by the domain's name."""
    return {path.stem: path.read_text("utf-8") for path in sorted(HELD_OUT.glob("*.txt"))}


@torch.no_grad()
def window_losses(model: Any, tokens: torch.Tensor, window: int = 512, batch: int = 8) -> torch.Tensor:
    """The mean negative log-likelihood per token of every window, in nats, float64 ``[windows]``.

    Text is cut into windows that do not overlap; the first token of each is context only.

    Args:
        model: a causal language model of transformers; its mode (training or eval) does not change.
        tokens: ``[n]`` ids.

    Raises:
        ValueError: fewer than 2 tokens.
    """
    window = min(window, len(tokens))
    if window < 2:
        raise ValueError(f"{len(tokens)} tokens; at least 2 are needed")
    check_ids(model, int(tokens.max()))
    rows = tokens[: len(tokens) // window * window].view(-1, window).to(model.device)
    training, losses = model.training, []
    model.eval()
    for ids in rows.split(batch):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses.append(each.view(len(ids), -1).double().mean(1).cpu())
    model.train(training)
    return torch.cat(losses)


def perplexity(model: Any, tokens: torch.Tensor, window: int = 512, batch: int = 8) -> float:
    """exp of the mean negative log-likelihood per token. Args and errors as `window_losses`."""
    return math.exp(float(window_losses(model, tokens, window, batch).mean()))


def text_ids(tokenizer: Any, texts: Mapping[str, str], tokens: int | None = None) -> dict[str, torch.Tensor]:
    """Token ids of each text, ``[n]``. Args as `perplexities`."""
    return {
        name: tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0][:tokens]
        for name, text in texts.items()
    }


def text_losses(
    model: Any, tokenizer: Any, texts: Mapping[str, str], tokens: int | None = None, window: int = 512
) -> dict[str, torch.Tensor]:
    """`window_losses` of each text. Args as `perplexities`."""
    return {name: window_losses(model, ids, window) for name, ids in text_ids(tokenizer, texts, tokens).items()}


def perplexities(
    model: Any, tokenizer: Any, texts: Mapping[str, str], tokens: int | None = None, window: int = 512
) -> dict[str, float]:
    """Perplexity of each text, and their geometric mean under ``mean``.

    Args:
        tokens: number of tokens from the beginning of each text; all by default.
    """
    losses = text_losses(model, tokenizer, texts, tokens, window)
    values = {name: math.exp(float(each.mean())) for name, each in losses.items()}
    values["mean"] = math.exp(sum(map(math.log, values.values())) / len(values))
    return values
