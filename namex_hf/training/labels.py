"""Tokens and labels of chats: rendered by the chat template, counted, and cut to the length of a sequence."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from rich.table import Table
from transformers import AutoTokenizer
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ..errors import TrainingError
from ..evaluation.perplexity import IGNORED
from ..evaluation.table import facts
from ..files import read_text
from ..limited import SECONDS, limited
from ..printable import printable
from .chats import Chats

WHOLE = ("bfd_split", "wrapped")
"""Strategies of packing that lose no token."""
COMMON_FIELDS = ("role", "content")


@dataclass(frozen=True)
class Labelled:
    """Chats as tokens, without chats whose answers are cut away."""

    train: Any
    """A `datasets.Dataset` of ``input_ids`` and ``labels``, not yet cut."""
    held_out: Any
    lengths: np.ndarray
    """Tokens of every chat for training, int64 ``[chats]``, including chats whose answers are cut away."""
    answers: np.ndarray
    """For each of these chats the answer tokens within the length of a sequence."""
    held_out_lost: int
    """Number of held-out chats whose answers are cut away."""
    longest: int | None
    """Tokens of a sequence; None: no limit."""
    loses: str
    """The effect of the limit on a longer chat, in words."""
    unread: tuple[str, ...]
    """Fields of turns and chats that the chat template does not use."""


def labelled(chats: Chats, tokenizer: Any, arguments: SFTConfig) -> Labelled:
    """Render and tokenize all chats.

    Args:
        tokenizer: not changed.
        arguments: arguments of the trainer: template, length, packing and loss are used here. The result does not
            depend on `dataset_num_proc`.

    Raises:
        TrainingError: the template cannot render a chat, a chat has no answer token, or no chat has an answer token
            within the length of a sequence.
    """
    tokenizer, template = _tokenizer_and_template(tokenizer, arguments)
    results = []
    packings = (arguments.packing, arguments.packing if arguments.eval_packing is None else arguments.eval_packing)
    with arguments.main_process_first(desc="reading chats"):  # the other processes read its result from disk
        for split, packed in zip((chats.train, chats.held_out), packings, strict=True):
            window, place = _window(arguments, packed), chats.places[split is chats.held_out]
            reader = Reader(tokenizer, template, arguments.assistant_only_loss, window, *place)
            results.append(_tokenized(split, reader, arguments.dataset_num_proc))
    (train, lengths, answers, unread), (held_out, _, held_answers, _) = results
    for name, counts in (("chats to train on", answers), ("held-out chats", held_answers)):
        if not counts.any():
            raise TrainingError(
                f"none of the {len(counts):,} {name} keeps a token of an answer within --max_length "
                f"{arguments.max_length}; accepted: a larger one, or shorter chats"
            )
    return Labelled(
        _with_answer(train, answers),
        _with_answer(held_out, held_answers),
        lengths,
        answers,
        int((held_answers == 0).sum()),
        arguments.max_length,
        _loses(arguments),
        unread,
    )


def _tokenizer_and_template(tokenizer: Any, arguments: SFTConfig) -> tuple[Any, str | None]:
    """The tokenizer and the template that the trainer would use; None: the tokenizer's own template."""
    tokenizer, path = deepcopy(tokenizer), arguments.chat_template_path
    if arguments.eos_token is not None:
        if arguments.eos_token not in tokenizer.get_vocab():
            raise TrainingError(f"--eos_token {arguments.eos_token}: the tokenizer does not have it")
        tokenizer.eos_token = arguments.eos_token
    if path is not None and Path(path).is_file() and path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = read_text(Path(path), TrainingError)
    elif path is not None:  # a model whose template, tokens and end-of-turn token replace the tokenizer's
        other = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.chat_template = other.chat_template
        vocab = tokenizer.get_vocab()
        tokenizer.add_tokens([token for token in other.added_tokens_decoder.values() if token.content not in vocab])
        tokenizer.eos_token = other.eos_token
    if arguments.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        try:
            return tokenizer, get_training_chat_template(tokenizer)
        except ValueError as error:
            raise TrainingError(
                "the chat template does not mark answers with {% generation %}; accepted: --chat_template_path with "
                "one that does, or --assistant_only_loss false"
            ) from error
    return tokenizer, None


def _window(arguments: SFTConfig, packed: bool) -> slice:
    """The part of a long chat that TRL does not cut away."""
    if arguments.max_length is None or (packed and arguments.packing_strategy in WHOLE):
        return slice(None)
    from_end = arguments.truncation_mode == "keep_end" and not packed
    return slice(-arguments.max_length, None) if from_end else slice(arguments.max_length)


def _loses(arguments: SFTConfig) -> str:
    window = _window(arguments, arguments.packing)
    if window == slice(None):
        return "are split"
    return "lose their end" if window.start is None else "lose their beginning"


def _tokenized(chats: Any, reader: "Reader", processes: int | None) -> tuple[Any, Any, Any, tuple[str, ...]]:
    """Tokens and labels; the numbers of tokens and of answer tokens of every chat; and the unread fields."""
    import datasets

    tokens, count = datasets.List(datasets.Value("int64")), datasets.Value("int64")
    features = {"input_ids": tokens, "labels": tokens, "length": count, "answer": count}
    features["unread"] = datasets.List(datasets.Value("string"))
    with limited(f"{reader.unit} {reader.numbers[0]}: the chat template", TrainingError, SECONDS):
        reader(chats[0], 0)
    environ = os.environ
    try:
        tokenized = chats.map(
            reader,
            with_indices=True,
            remove_columns=chats.column_names,
            features=datasets.Features(features),
            num_proc=processes,
            desc="reading chats",
        )
    finally:  # with several processes `map` replaces `os.environ` by a copy, and other modules hold the original
        os.environ = environ  # noqa: B003  (the object, not its content)
    length, answer = (np.asarray(tokenized.with_format("numpy")[name][:]) for name in ("length", "answer"))
    unread = sorted({name for names in tokenized["unread"] for name in names})
    return tokenized.select_columns(["input_ids", "labels"]), length, answer, tuple(unread)


def _with_answer(rows: Any, answers: np.ndarray) -> Any:
    return rows if answers.all() else rows.select(np.flatnonzero(answers))


@dataclass(frozen=True)
class Reader:
    """Converts a chat to tokens and labels."""

    tokenizer: Any
    template: str | None
    """None: the tokenizer's own."""
    answers_alone: bool
    window: slice
    """The part of a long chat that is not cut away."""
    unit: str
    """The term for a row in messages."""
    numbers: Sequence[int]

    def __call__(self, chat: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{self.unit} {self.numbers[index]}"
        options = {"tools": chat.get("tools"), "chat_template": self.template}
        options |= chat.get("chat_template_kwargs") or {}
        render, masks = self.tokenizer.apply_chat_template, self.answers_alone
        try:
            _check_read(chat["messages"], lambda turns: render(turns, tokenize=False, **options), where)
            rendered = render(
                chat["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=masks, **options
            )
        except TrainingError:
            raise
        except Exception as error:  # a template can raise any error
            reason = f"{type(error).__name__}: {error}"
            raise TrainingError(f"{where}: the chat template does not take it: {reason}") from error
        ids = rendered["input_ids"]
        mask = rendered["assistant_masks"] if self.answers_alone else [1] * len(ids)
        if 1 not in mask:
            raise TrainingError(f"{where}: the chat template marks no token of an answer, so there is nothing to learn")
        labels = [token if is_answer else IGNORED for token, is_answer in zip(ids, mask, strict=True)]
        return {
            "input_ids": ids,
            "labels": labels,
            "length": len(ids),
            "answer": sum(label != IGNORED for label in labels[self.window][1:]),  # the first token is not predicted
            "unread": _unread(chat, self.template or self.tokenizer.chat_template),
        }


def _unread(chat: dict[str, Any], template: Any) -> list[str]:
    text = " ".join(map(str, template.values())) if isinstance(template, dict) else str(template)
    names = {name for turn in chat["messages"] for name, value in turn.items() if value is not None}
    names |= {"tools"} if chat.get("tools") else set()
    names |= set(chat.get("chat_template_kwargs") or {})
    return sorted(name for name in names.difference(COMMON_FIELDS) if name not in text)


def _check_read(messages: list[dict[str, Any]], render: Callable[..., Any], where: str) -> None:
    """Check that the template renders tool calls and content in parts. (transformers renders null content as no text.)

    Raises:
        TrainingError: it does not, so the model would be trained on another text.
    """
    special = [turn for turn in messages if turn.get("tool_calls") or not isinstance(turn["content"], str)]
    if not special:
        return

    text = render(messages)
    if any(turn.get("tool_calls") for turn in special):
        without = [{name: value for name, value in turn.items() if name != "tool_calls"} for turn in messages]
        with suppress(TemplateError):  # a template that fails without the calls reads them
            if render(without) == text:
                raise TrainingError(f"{where}: the chat template does not read tool_calls; accepted: one that does")
    for content in (turn["content"] for turn in special if isinstance(turn.get("content"), list)):
        if str(content) in text or not all(part["text"].strip() in text for part in content):
            raise TrainingError(f"{where}: the chat template does not read content in parts; accepted: text")


def length_table(chats: Labelled) -> Table:
    """Lengths of the chats, and the tokens that are cut away, for a terminal."""
    counts = chats.lengths
    longest = int(counts.max()) if chats.longest is None else chats.longest
    half, most = np.quantile(counts, (0.5, 0.9)).round().astype(int).tolist()
    lost, cut = int((chats.answers == 0).sum()), int((counts > longest).sum())
    table = {
        "chats": f"{len(counts):,}",
        "tokens a chat": f"mean {np.mean(counts):.0f}, median {half}, nine in ten up to {most}",
        "the longest": f"{counts.max():,}",
        f"longer than a sequence of {longest:,}": f"{cut:,}, which {chats.loses}" if cut else "none",
    }
    if cut and chats.loses.startswith("lose"):
        table["tokens cut away"] = f"{np.maximum(counts - longest, 0).sum():,}"
    if lost:
        table["no token of an answer is left"] = f"{lost:,}, which are left out"
    if chats.held_out_lost:
        table["the same of held-out chats"] = f"{chats.held_out_lost:,}, which are not scored"
    table["tokens in all"] = f"{counts.sum():,}"
    if chats.unread:
        table["not read by the chat template"] = printable(", ".join(chats.unread), 200)
    return facts(table, "chats to train on")
