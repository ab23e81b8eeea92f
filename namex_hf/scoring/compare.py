"""Two models over the same text."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .. import models  # noqa: F401  (registers the classes that the folders need)
from .perplexity import held_out_texts, perplexities


def load(folder: str | Path) -> Any:
    """A model in float32 on the CPU, without transformers' own progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def compare(before: Path, after: Path, tokens: int | None = None) -> dict[str, dict[str, float]]:
    """Perplexity per domain of the packaged held-out text, before and after, with the geometric mean last.

    Memory: one of the models at a time.
    """
    tokenizer, texts = AutoTokenizer.from_pretrained(before), held_out_texts()
    found = {}
    for name, folder in (("before", before), ("after", after)):
        found[name] = perplexities(load(folder), tokenizer, texts, tokens)
    return {domain: {"before": found["before"][domain], "after": found["after"][domain]} for domain in found["before"]}
