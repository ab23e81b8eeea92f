"""Calibration text: documents of every source, packed into token sequences of one length."""

import hashlib
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from .sources import Chat, Documents, open_sources

#: Characters of the longest piece of a document, in units of a sequence's tokens: about two sequences of English.
PIECE = 8
#: One sequence of so many of a source is for validation.
VALIDATION_ONE_IN = 8


@dataclass(frozen=True)
class CalibrationText:
    """Token sequences, in which the sources take turns.

    Attributes:
        ids: ``[sequences, length]`` int64.
        sources: ``[sequences]`` int64, the number of the file or data set that each is of.
        name: of the text, with its commit if it has one; never a path.
        sha256: of the ids as little-endian int64.
    """

    ids: Tensor
    sources: Tensor
    name: str
    sha256: str

    @classmethod
    def of(cls, ids: Tensor, sources: Tensor, name: str) -> "CalibrationText":
        """With the hash of the ids."""
        return cls(ids, sources, name, hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest())

    @property
    def tokens(self) -> int:
        """How many there are: fewer than asked for where the text ends."""
        return self.ids.numel()

    @property
    def held_out(self) -> Tensor:
        """``[sequences]``, boolean: of each source of two sequences or more the last eighth, or one.

        Raises:
            CalibrationError: no source has two sequences.
        """
        held_out = torch.zeros(len(self.ids), dtype=torch.bool)
        for source in self.sources.unique():
            rows = (self.sources == source).nonzero().flatten()
            if len(rows) > 1:
                held_out[rows[-max(1, len(rows) // VALIDATION_ONE_IN) :]] = True
        if not held_out.any():
            raise CalibrationError(
                f"calibration data {self.name}: {len(self.ids)} sequences, and no file or data set has two, so none"
                " can be held back for validation; accepted: more calibration tokens"
            )
        return held_out


def calibration_text(
    source: str | Sequence[str | Chat], tokenizer: Any, tokens: int, length: int, seed: int
) -> CalibrationText:
    """``tokens // length`` sequences of ``length`` tokens of the text that ``source`` names, fewer where it ends.

    The sources (files, or one data set) take turns, in random order, so that each is read under a small budget; one
    that is at its end leaves its turns to the others. Documents come in random order, long ones in pieces in random
    order; each is closed by the tokenizer's end of text, if it has one, and they are packed without padding. Tails too
    short for a sequence are packed together as if they were one more source, so that many short files make a text.
    Equal files, tokenizer and numbers give equal ids.

    Args:
        source: ``packaged``; a text file, a document; a ``.jsonl`` file, a document a line (``{"messages": [...]}`` or
            ``{"text": ...}``); a folder of such files; or a Hub data set with a column of either name. Else texts and
            chats themselves, of `check_texts`.
        tokenizer: of transformers; its chat template writes the messages.

    Raises:
        CalibrationError: ``source`` names nothing, cannot be read, or has too little text for one sequence; numbers
            that leave no sequence.
        MissingExtraError: a Hub data set without the library that reads it.
    """
    check_length(tokens, length)
    name, documents = open_sources(source, tokenizer, seed)
    random.Random(seed).shuffle(documents)
    tails: list[int] = []
    packed = [_sequences(one, tokenizer, length, random.Random(seed), tails) for one in documents]
    rows, sources = _in_turn(packed, tails, tokens // length, length)
    if not rows:
        named = source if isinstance(source, str) else name
        raise CalibrationError(f"calibration data {named} has {len(tails)} tokens of text; a sequence needs {length}")
    return CalibrationText.of(torch.tensor(rows), torch.tensor(sources), name)


def check_length(tokens: int, length: int) -> None:
    """Raises:
    CalibrationError: these numbers leave no sequence.
    """
    if not 1 <= length <= tokens:
        raise CalibrationError(f"{tokens} calibration tokens, and sequences of {length}; accepted: 1 sequence or more")


def _sequences(
    documents: Documents, tokenizer: Any, length: int, draw: random.Random, tails: list[int]
) -> Iterator[list[int]]:
    """Documents packed into sequences; what is left at the end goes to ``tails``."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    held: list[int] = []
    for document in documents:
        parts = pieces(document, PIECE * length)
        draw.shuffle(parts)
        for piece in parts:
            held += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids + end
            while len(held) >= length:
                yield held[:length]
                del held[:length]
    tails += held


def _in_turn(
    packed: list[Iterator[list[int]]], tails: list[int], count: int, length: int
) -> tuple[list[list[int]], list[int]]:
    """At most ``count`` sequences, and the number of the source of each; the tails are the source after the last."""
    rows: list[list[int]] = []
    sources: list[int] = []
    turns = deque(enumerate(packed))
    while turns and len(rows) < count:
        source, sequences = turns.popleft()
        row = next(sequences, None)
        if row is not None:
            turns.append((source, sequences))
        elif len(tails) >= length:  # by less than a sequence: every tail is shorter than one
            source, row = len(packed), tails[:length]
            del tails[:length]
        if row is not None:
            rows.append(row)
            sources.append(source)
    return rows, sources


def pieces(text: str, size: int) -> list[str]:
    """A text in pieces of at most ``size`` characters, cut after a blank line, a line or a word where there is one."""
    parts, start = [], 0
    while start < len(text):
        end = start + size
        if end < len(text):
            ends = [(text.rfind(mark, start + size // 2, end), len(mark)) for mark in ("\n\n", "\n", " ")]
            end = next((place + width for place, width in ends if place >= 0), end)
        parts.append(text[start:end])
        start = end
    return [piece for piece in parts if piece.strip()]
