"""Opening and checking the tokenizer of a checkpoint."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..errors import CheckpointError


def open_tokenizer(folder: Path, name: str, rows: int | None = None, trust_remote_code: bool = False) -> Any:
    """Open the tokenizer; code of the folder runs only under `trust_remote_code`.

    Args:
        name: name of the checkpoint, for messages.
        rows: number of rows of the model's embedding; None: not checked.

    Raises:
        CheckpointError: transformers cannot open it, its `model_max_length` is not a number of tokens, or it has a
            token that the embedding lacks.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:  # a foreign tokenizer can raise any error
        raise CheckpointError(
            f"{name} has no tokenizer that transformers can open ({type(error).__name__}: {error})"
        ) from error
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise CheckpointError(
            f"{name}: model_max_length in tokenizer_config.json is {longest!r}; accepted: a number of tokens from 1"
        )
    if rows is not None and largest >= rows:
        raise CheckpointError(f"{name}: its tokenizer has token id {largest}; the embedding has {rows} rows")
    return tokenizer


def check_ids(model: Any, largest: int) -> None:
    """Check that the embedding of a transformers model has a row for the largest token id.

    Raises:
        CheckpointError: there is no such row; an accelerator would abort the whole process.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is not None and largest >= (rows := embedding.weight.shape[0]):
        raise CheckpointError(f"the tokenizer gives token id {largest}; the embedding has {rows} rows")
