"""What the packaged tasks read. lm-eval finds this file beside their YAML."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from namex_hf.evaluation.arithmetic import PROBLEMS
from namex_hf.evaluation.perplexity import held_out_texts
from namex_hf.evaluation.samples import read_samples
from namex_hf.evaluation.text_task import as_dataset, measured, pieces

PIECES = 8  # of each domain: the beginning, as much as a comparison needs


def load(name: str, **_: Any) -> DatasetDict:
    """One of the sets in ``data/``: the splits ``examples`` and ``test``. The word problems are the package's own."""
    here = Path(__file__).parent / "data"
    test = PROBLEMS if name == "word_problems" else here / f"{name}_test.jsonl"
    files = {"examples": here / f"{name}_examples.jsonl", "test": test}
    return DatasetDict({split: Dataset.from_list(read_samples(file)) for split, file in files.items()})


def held_out(**_: Any) -> DatasetDict:
    """The beginnings of the packaged held-out texts, domain after domain."""
    return as_dataset([piece for text in held_out_texts().values() for piece in pieces(text)[:PIECES]])


__all__ = ["held_out", "load", "measured"]
