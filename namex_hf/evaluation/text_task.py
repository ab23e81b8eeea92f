"""Perplexity of text as a task of lm-eval: any file, in pieces that are scored one by one.

Pieces are what a paired comparison draws from. Measured a word and a byte, as lm-eval's ``wikitext``, so that models
with other tokenizers compare.
"""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from ..errors import TaskError
from ..files import LARGEST_TEXT, read_text

PIECE = 2000
"""Characters from which on a piece ends at the next blank line."""


def pieces(text: str, size: int = PIECE) -> list[str]:
    """The text cut at blank lines into pieces of at least `size` characters but the last; only blanks are lost."""
    parts: list[str] = []
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.strip():
            continue
        paragraphs.append(paragraph.strip("\n"))
        if sum(map(len, paragraphs)) >= size:
            parts.append("\n\n".join(paragraphs))
            paragraphs = []
    return parts + (["\n\n".join(paragraphs)] if paragraphs else [])


def as_dataset(texts: list[str], **_: Any) -> DatasetDict:
    """Documents of one column, ``text``, as the split ``test``."""
    return DatasetDict({"test": Dataset.from_dict({"text": texts})})


def measured(document: dict[str, str], results: list[float]) -> dict[str, tuple[float, int]]:
    """``process_results`` of a piece of text."""
    (log_likelihood,) = results
    size, words = len(document["text"].encode()), len(document["text"].split())
    return {
        "bits_per_byte": (log_likelihood, size),
        "byte_perplexity": (log_likelihood, size),
        "word_perplexity": (log_likelihood, words),
    }


def text_task(path: Path) -> dict[str, Any]:
    """The task of one file, named ``text_STEM``.

    Raises:
        TaskError: no such file, too large, not UTF-8, or nothing in it.
    """
    try:
        texts = pieces(read_text(path, TaskError, LARGEST_TEXT))
    except TaskError as error:
        raise TaskError(f"--texts {error}") from error
    if not texts:
        raise TaskError(f"--texts {path} is empty; at least one line of text is needed")
    return {
        "task": "text_" + re.sub(r"\W+", "_", path.stem),
        "custom_dataset": lambda **_: as_dataset(texts),
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "process_results": measured,
        "metric_list": [{"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
