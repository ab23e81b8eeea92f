"""Comparison of two models on the same text."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .. import models  # noqa: F401  (registers the classes that the folders need)
from ..checkpoint.tokenizer import open_tokenizer
from ..evaluation.statistics import perplexity_change
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
        losses[name] = {domain: window_losses(model, each).tolist() for domain, each in ids.items()}
        del model  # before the next model is loaded
    groups = {**{domain: [domain] for domain in texts}, "mean": list(texts)}
    return {
        group: perplexity_change(*([losses[when][name] for name in domains] for when in ("before", "after")))
        for group, domains in groups.items()
    }
