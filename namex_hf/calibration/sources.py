"""From what a user names or hands over to documents: the packaged text, files, a data set of the Hub, own texts.

A source is an iterator of documents in random order that reads no further than it is asked.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import CalibrationError
from ..files import LARGEST_TEXT, bounded_lines, decoded, open_regular, parse_json, read_bytes
from ..limited import limited
from .hub_source import FORM, hub_rows, is_hub_name
from .records import pair_of, plain_of, tools_of, turns_of

PACKAGED = Path(__file__).parent.parent / "packaged" / "calibration"
ACCEPTED = f"'packaged', a text file, a .jsonl file, a folder of these, token ids (.npy), or a Hub data set {FORM}"

OWN_TEXTS = "own texts"
"""Under this name texts are recorded that a caller hands over."""

Documents = Iterator[str]
Chat = Sequence[Mapping[str, Any]]
"""Messages, each with ``role`` and ``content``."""
Texts = Iterable[str | Chat]
"""Documents and chats; a `str` alone is none."""


def open_sources(source: str | Sequence[str | Chat], tokenizer: Any, seed: int) -> tuple[str, list[Documents]]:
    """The name under which ``source`` may be recorded, never a path, and its sources: one a file, one for all else.

    ``packaged`` is the packaged text whatever the working directory has, without its chats where the tokenizer has no
    chat template; a path that exists is no Hub data set.

    Raises:
        CalibrationError: nothing that is accepted, or a Hub data set that cannot be had. While documents are read:
            bytes that are not UTF-8, lines that are not JSON, records without text or that the chat template refuses.
        MissingExtraError: a Hub data set without the library that reads it.
    """
    if not isinstance(source, str):
        return OWN_TEXTS, [_own(source, tokenizer, random.Random(seed))]
    check_source(source)
    if source == "packaged":
        files = [file for file in _files(PACKAGED) if tokenizer.chat_template or file.suffix != ".jsonl"]
        return source, [_documents(file, tokenizer, random.Random(seed)) for file in files]
    path = Path(source)
    if path.exists():
        return path.resolve().name, [_documents(file, tokenizer, random.Random(seed)) for file in _files(path)]
    name, rows = hub_rows(source, seed)
    return name, [(_text(row, tokenizer, f"a row of {source}") for row in rows)]


def check_source(source: str) -> None:
    """Raises:
    CalibrationError: nothing that is accepted, as far as can be said without reading it.
    """
    model, _, chats = source.partition(":")
    if model == "self" and not Path(source).exists():
        command = "namex answers MODEL --out answers.jsonl" + (f" --chats {chats}" if chats else "")
        raise CalibrationError(
            f"calibration data {source}: a model's own answers are made first, by {command}; accepted then: that file"
        )
    on_hub = is_hub_name(source) and not is_token_ids(source)
    if not source or not (source == "packaged" or Path(source).exists() or on_hub):
        raise CalibrationError(f"calibration data {source}: no such file or folder; accepted: {ACCEPTED}")


def is_token_ids(source: str) -> bool:
    """Whether calibration data of this name are token ids: the name ends in ``.npy``, in any case of letters."""
    return source.lower().endswith(".npy")


def is_own_text(source: str) -> bool:
    """Whether calibration data of this name are a file or a folder of texts here."""
    return source != "packaged" and not is_token_ids(source) and Path(source).exists()


def check_texts(texts: Texts) -> list[str | Chat]:
    """Texts as a list.

    Raises:
        CalibrationError: one is neither text nor a list of messages.
    """
    if isinstance(texts, str):
        raise CalibrationError("texts is one text; accepted: a list of texts and chats")
    whole = list(texts)
    for number, text in enumerate(whole):
        if not isinstance(text, str | list | tuple):
            raise CalibrationError(f"texts[{number}] is {type(text).__name__}; accepted: text, or a list of messages")
    return whole


def _own(texts: Sequence[str | Chat], tokenizer: Any, draw: random.Random) -> Documents:
    order = list(enumerate(texts))
    draw.shuffle(order)
    for number, text in order:
        record = {"text": text} if isinstance(text, str) else {"messages": list(text)}
        yield _text(record, tokenizer, f"texts[{number}]")


def _files(path: Path) -> list[Path]:
    """The file itself, or all below a folder in sorted order, but for hidden ones and those in hidden folders."""
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _documents(file: Path, tokenizer: Any, draw: random.Random) -> Documents:
    if file.suffix.lower() != ".jsonl":
        yield decoded(read_bytes(file, CalibrationError, LARGEST_TEXT), str(file), CalibrationError)
        return
    for number, line in _lines(file, draw):
        where = f"{file}, line {number}"
        if text := decoded(line, where, CalibrationError).strip():
            yield _text(parse_json(text, where, CalibrationError), tokenizer, where)


def _lines(file: Path, draw: random.Random) -> Iterator[tuple[int, bytes]]:
    """Lines and their numbers in random order. Memory: the beginnings of the lines, and one line."""
    with open_regular(file, CalibrationError) as lines:
        order = list(enumerate([0, *accumulate(map(len, bounded_lines(lines, file, CalibrationError)))][:-1], 1))
    draw.shuffle(order)
    for number, start in order:
        with open_regular(file, CalibrationError) as lines:
            lines.seek(start)
            yield number, lines.readline()


def _text(record: Any, tokenizer: Any, where: str) -> str:
    """The text of a record, or its messages as the chat template writes them."""
    fields = record if isinstance(record, Mapping) else {}
    turns, plain, pair = turns_of(fields), plain_of(fields), pair_of(fields)
    if turns is None and plain is None and pair and tokenizer.chat_template:
        turns = [{"role": role, "content": said} for role, said in zip(("user", "assistant"), pair, strict=True)]
    if turns is not None:
        text = _chat(turns, tools_of(fields), tokenizer, where)
    elif plain is not None:
        text = plain
    elif pair:
        text = "\n\n".join(pair)
    else:
        present = ", ".join(fields) or "neither"
        raise CalibrationError(f"{where}: accepted: a list of 'messages' or a 'text'; found: {present}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise CalibrationError(f"{where} is not text: {error.reason}") from error
    return text


def _chat(messages: list[Any], tools: list[Any] | None, tokenizer: Any, where: str) -> str:
    if not tokenizer.chat_template:
        raise CalibrationError(f"{where} is a chat, and the tokenizer has no chat template; accepted then: a 'text'")
    try:
        with limited(f"{where}: the tokenizer's chat template", CalibrationError):
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except CalibrationError:
        raise
    except Exception as error:  # a template is a program: what it raises is no closed set
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CalibrationError(f"{where}: the tokenizer's chat template refuses it: {reason}") from error
