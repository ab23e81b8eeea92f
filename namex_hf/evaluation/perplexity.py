"""Losses and perplexity of a causal language model over text, and over the labelled tokens of chats."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..checkpoint.tokenizer import check_ids, open_tokenizer
from .loading import load
from .statistics import perplexity_change

IGNORED = -100
"""The label of a token that does not count."""
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
        each = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
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


def before_and_after(before: Path, after: Path, tokens: int | None = None) -> dict[str, dict[str, float]]:
    """Perplexity per domain of the packaged held-out text, before and after, with the geometric mean last.

    Further entries are the standard errors over windows of text: ``before_stderr``, ``after_stderr``, and
    ``ratio_stderr``, paired window by window. They are absent if a text has a single window.

    Memory: one of the models at a time.
    """
    tokenizer, texts = open_tokenizer(before, before.name), held_out_texts()
    ids, losses = text_ids(tokenizer, texts, tokens), {}
    for name, folder in (("before", before), ("after", after)):
        model = load(folder)
        losses[name] = {domain: window_losses(model, each).tolist() for domain, each in ids.items()}
        del model  # before the next model is loaded
    groups = {**{domain: [domain] for domain in texts}, "mean": list(texts)}
    return {
        group: perplexity_change(*([losses[when][name] for name in domains] for when in ("before", "after")))
        for group, domains in groups.items()
    }


@torch.no_grad()
def labelled_losses(model: Any, rows: Sequence[dict[str, Any]], pad: int, batch: int = 8) -> torch.Tensor:
    """The mean negative log-likelihood of each row's labelled tokens, in nats, float64 ``[rows]``.

    Args:
        model: a causal language model of transformers; its mode (training or eval) does not change.
        rows: ``input_ids`` and ``labels``, which are `IGNORED` for tokens that do not count. Each row needs a label
            after its first token.
        pad: the token that fills shorter rows of a batch.
    """
    training, losses = model.training, []
    model.eval()
    for start in range(0, len(rows), batch):
        part = [rows[index] for index in range(start, min(start + batch, len(rows)))]
        longest = max(len(row["input_ids"]) for row in part)
        ids = torch.full((len(part), longest), pad)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for place, row in enumerate(part):
            length = len(row["input_ids"])
            ids[place, :length], mask[place, :length] = torch.tensor(row["input_ids"]), 1
            labels[place, :length] = torch.tensor(row["labels"])
        ids, labels, mask = (tensor.to(model.device) for tensor in (ids, labels, mask))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        targets = labels[:, 1:]
        each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
        counted = (targets != IGNORED).sum(1)
        losses.append((each.view_as(targets).double().sum(1) / counted).cpu())
    model.train(training)
    return torch.cat(losses)
