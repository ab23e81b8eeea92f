"""Comparison of two models on the same text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .. import models  # noqa: F401  (registers the classes that the folders need)
from ..checkpoint.tokenizer import open_tokenizer
from .perplexity import held_out_texts, text_ids, window_losses


def load(folder: str | Path) -> Any:
    """A model in float32 on the CPU, loaded without transformers' own progress bar."""
    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if had_bar:
            logging.enable_progress_bar()


def compare(before: Path, after: Path, tokens: int | None = None) -> dict[str, dict[str, float]]:
    """Perplexity per domain of the packaged held-out text, before and after, with the geometric mean last.

    Further entries are the standard errors over windows of text: ``before_stderr``, ``after_stderr``, and
    ``ratio_stderr``, paired window by window. They are absent if a text has a single window.

    Memory: one of the models at a time.
    """
    tokenizer, texts = open_tokenizer(before, before.name), held_out_texts()
    ids, losses = text_ids(tokenizer, texts, tokens), {}
    for name, folder in (("before", before), ("after", after)):
        model = load(folder)
        losses[name] = {domain: window_losses(model, each) for domain, each in ids.items()}
        del model  # before the next model is loaded
    groups = {**{domain: [domain] for domain in texts}, "mean": list(texts)}
    return {
        group: measured([losses["before"][name] for name in domains], [losses["after"][name] for name in domains])
        for group, domains in groups.items()
    }


def measured(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> dict[str, float]:
    """Perplexities and their standard errors, by the delta method.

    Args:
        before, after: for each text the losses of its windows in nats, float64 ``[windows]``.
    """
    values = {"before": before, "after": after, "ratio": [new - old for old, new in zip(before, after, strict=True)]}
    means = {name: math.exp(sum(float(each.mean()) for each in texts) / len(texts)) for name, texts in values.items()}
    results = {name: means[name] for name in ("before", "after")}
    if min(map(len, before)) > 1:
        for name, texts in values.items():
            spread = math.sqrt(sum(float(each.var()) / len(each) for each in texts)) / len(texts)
            results[f"{name}_stderr"] = means[name] * spread
    return results
