"""Calibration text as token ids in a NumPy file, for models whose tokenizer is missing or needs code of its own."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CalibrationError
from ..files import open_regular
from .text import CalibrationText, check_length

FORM = "integers, [tokens] or [sequences, length], as numpy.save writes them"


def open_ids(path: Path, tokens: int) -> Any:
    """The array in a file, ``[tokens]`` or ``[sequences, length]``, mapped into memory; only its header is read.

    Args:
        tokens: how many are needed.

    Raises:
        CalibrationError: no file of NumPy, a damaged one, pickled objects, another dtype or number of axes, or too few
            tokens.
    """
    with open_regular(path, CalibrationError) as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise CalibrationError(f"{path} is no array that numpy.save wrote; accepted: {FORM}")
    try:
        with np.errstate(over="raise"):  # the size of an array that no memory holds
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # what NumPy raises of a damaged header is no closed set
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CalibrationError(f"{path} cannot be read ({reason}); accepted: {FORM}") from error
    if ids.dtype.kind not in "iu":
        raise CalibrationError(f"{path} holds {ids.dtype}; accepted: {FORM}")
    if ids.ndim not in (1, 2):
        raise CalibrationError(f"{path} has {ids.ndim} axes; accepted: {FORM}")
    if ids.size < tokens:
        raise CalibrationError(f"{path} has {ids.size} tokens, and {tokens} are asked for; accepted: up to {ids.size}")
    return ids


def text_of_ids(path: Path, vocabulary: int, tokens: int, length: int, seed: int) -> CalibrationText:
    """``tokens // length`` sequences of ``length`` tokens of a file, drawn by the seed, in random order.

    The rows of the file are joined in their order and cut anew into sequences of ``length``; the tail that is too short
    for one is left out. All sequences are of one source.

    Args:
        vocabulary: every id in the file is below it.

    Memory: the sequences; of an array in Fortran order also a copy of the file.

    Raises:
        CalibrationError: as `open_ids`, an id that the model does not have, or numbers that leave no sequence.
    """
    check_length(tokens, length)
    ids = open_ids(path, tokens).reshape(-1)
    for found in (int(ids.min()), int(ids.max())):
        if not 0 <= found < vocabulary:
            accepted = f"0 to {vocabulary - 1}, below vocab_size in config.json"
            raise CalibrationError(f"{path} has token id {found}; accepted: {accepted}")
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    chosen = rows[random.Random(seed).sample(range(len(rows)), tokens // length)].astype(np.int64)
    sources = torch.zeros(len(chosen), dtype=torch.int64)
    return CalibrationText.of(torch.from_numpy(chosen), sources, path.resolve().name)
