"""Reading and checking of chats for training; `labels` converts them to tokens."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.hub_source import NAME as HUB_NAME
from ..checkpoint.hub import hub_client
from ..errors import MissingExtraError, TrainingError
from ..files import bounded_lines, open_regular, parse_json
from ..version import __version__

PACKAGED = Path(__file__).parent.parent / "packaged" / "chats"
ROLES = ("system", "user", "assistant", "tool")
COLUMNS = ("messages", "tools", "chat_template_kwargs")
"""Columns of a chat in TRL: turns, tools, and further variables of the chat template."""
Chat = dict[str, Any]


@dataclass(frozen=True)
class Chats:
    """Chats for training and held-out chats for scores, each a `datasets.Dataset` with some of `COLUMNS`."""

    train: Any
    held_out: Any
    name: str
    """Name of the data, never a path; of a Hub data set with its commit."""
    sha256: str | None
    """Hash of a local file's chats."""
    places: tuple[tuple[str, Sequence[int]], tuple[str, Sequence[int]]]
    """For both, the term for a row in messages, and the number of each row in the file or split."""


def load_chats(source: str | None, config: str | None, splits: tuple[str, str], held_out: int, seed: int) -> Chats:
    """Read and check all chats of a source.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file with `messages`, or a Hub data set; None: the packaged chats.
        config: configuration of a Hub data set.
        splits: names of the splits for training and for scores. Of a local file, random chats by `seed` are held out.
        held_out: number of chats for scores, at least 2; of a local file at most a tenth.

    Memory: all chats of a local file.

    Raises:
        TrainingError: there is no such source, a line or row (given by its number) is not a chat, or there are too few.
        MissingExtraError: ``datasets`` is not installed.
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("reading chats", "train") from error
    path = None if source is None else Path(source)
    if path is not None and not path.is_file():
        return _of_hub(str(source), config, splits, held_out)
    if config is not None:
        raise TrainingError(f"--dataset_config {config} belongs to a Hub data set; found {path or 'none'}")
    if path is None:
        train, back = (list(_numbered(PACKAGED / f"{name}.jsonl")) for name in ("train", "held_out"))
        return _in_memory("packaged", train, back[:held_out], ("packaged, chat", "packaged, held-out chat"))
    numbered = list(_numbered(path))
    count = min(held_out, len(numbered) // 10)
    if count < 2:
        raise TrainingError(f"{path}: {len(numbered)} chats; at least 20 are needed to hold two back")
    order = np.random.default_rng(seed).permutation(len(numbered)).tolist()
    back, train = ([numbered[index] for index in sorted(part)] for part in (order[:count], order[count:]))
    unit = f"{path} {'row' if path.suffix == '.parquet' else 'line'}"
    return _in_memory(path.name, train, back, (unit, unit))


def _in_memory(name: str, train: list[tuple[int, Chat]], back: list[tuple[int, Chat]], units: tuple[str, str]) -> Chats:
    """Chats of local files, each with its number."""
    rows, held = ([chat for _, chat in part] for part in (train, back))
    places = ((units[0], [number for number, _ in train]), (units[1], [number for number, _ in back]))
    digest = hashlib.sha256(json.dumps([rows, held]).encode()).hexdigest()
    return Chats(_data_set(rows), _data_set(held), name, digest, places)


def _data_set(rows: list[Chat]) -> Any:
    """A data set of JSON columns: in Arrow's structures a field of a single turn would be a null in all others."""
    import datasets

    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    filled = [{name: row.get(name) for name in columns} for row in rows]  # datasets takes the names of the first row
    return datasets.Dataset.from_list(filled, features=_features(columns))


def _features(columns: Sequence[str]) -> Any:
    import datasets

    return datasets.Features({name: datasets.Json() for name in columns})


def _of_hub(name: str, config: str | None, splits: tuple[str, str], held_out: int) -> Chats:
    import datasets
    from huggingface_hub import dataset_info

    if not HUB_NAME.fullmatch(name) or ":" in name:
        raise TrainingError(f"--dataset_name {name}: accepted: a .jsonl or .parquet file, or a Hub data set OWNER/NAME")
    try:
        with hub_client():
            commit = dataset_info(name).sha
        train, back = (datasets.load_dataset(name, config, split=split, revision=commit) for split in splits)
    except Exception as error:  # the library and the network can raise any error
        reason = f"{type(error).__name__}: {error}"
        raise TrainingError(f"--dataset_name {name} cannot be read as a Hub data set: {reason}") from error
    if "messages" not in train.column_names:
        raise TrainingError(f"{name} has the columns {', '.join(train.column_names)}; 'messages' is needed")
    chosen = back.select(range(min(held_out, len(back))))
    if not len(train) or len(chosen) < 2:
        raise TrainingError(
            f"{name}: {len(train)} chats in {splits[0]}, {len(back)} in {splits[1]}; needed: one and two"
        )
    units = [f"{name} {split} row" for split in splits]
    rows, held = (_checked_rows(*each) for each in zip((train, chosen), units, strict=True))
    source_name = name if config is None else f"{name}:{config}"
    places = ((units[0], range(1, 1 + len(train))), (units[1], range(1, 1 + len(chosen))))
    return Chats(rows, held, f"{source_name}@{commit}", None, places)


def _checked_rows(rows: Any, unit: str) -> Any:
    """The same chats in the form of `_data_set`; on disk if `rows` are."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    names = rows.column_names
    columns = [name for name in COLUMNS if name in names or (name == "chat_template_kwargs" and "documents" in names)]
    arguments = {"features": rows.features, "unit": unit, "columns": columns, "version": __version__}
    kind = {"features": _features(columns), "remove_columns": names}
    had_bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return rows.map(_checked_row, with_indices=True, fn_kwargs=arguments, **kind)
    finally:
        if had_bars:
            enable_progress_bar()


def _checked_row(row: Any, index: int, features: Any, unit: str, columns: Sequence[str], version: str) -> Chat:
    """A checked row. `version` makes `datasets` ignore the cache of another release."""
    chat = checked(_whole(row, features), f"{unit} {index + 1}")
    return {name: chat.get(name) for name in columns}


def _whole(row: Any, features: Any) -> dict[str, Any]:
    return {name: present(row[name], feature) for name, feature in features.items()}


def present(value: Any, feature: Any) -> Any:
    """A value without the nulls that stand for missing fields in Arrow's structures.

    Arrow does not distinguish a null field from a missing field. The content of a turn may be null.
    """
    import datasets

    if isinstance(feature, dict) and isinstance(value, dict):
        fields = {name: item for name, item in value.items() if item is not None or name == "content"}
        return {name: present(item, feature.get(name)) for name, item in fields.items()}
    if isinstance(feature, list | datasets.List | datasets.LargeList) and isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else feature.feature
        return [present(item, inner) for item in value]
    return value


def file_chats(path: Path) -> Iterator[Chat]:
    """The chats of a file, one for each line or row.

    Raises:
        TrainingError: a line or row is not a chat.
    """
    return (chat for _, chat in _numbered(path))


def _numbered(path: Path) -> Iterator[tuple[int, Chat]]:
    """The chats of a file, with the number of the line or row."""
    if path.suffix == ".parquet":
        yield from _parquet_chats(path)
    elif path.suffix in (".jsonl", ".json"):
        with open_regular(path, TrainingError) as file:
            for number, line in enumerate(bounded_lines(file, path, TrainingError), start=1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield number, checked(parse_json(line, where, TrainingError), where)
    else:
        raise TrainingError(f"{path}: accepted: .jsonl, a chat a line, or .parquet with a column 'messages'")


def _parquet_chats(path: Path) -> Iterator[tuple[int, Chat]]:
    import datasets
    import pyarrow.parquet

    try:
        rows = datasets.Dataset(datasets.table.InMemoryTable(pyarrow.parquet.read_table(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise TrainingError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(rows, start=1):
        yield number, checked(_whole(row, rows.features), f"{path} row {number}")


def checked(row: Any, where: str) -> Chat:
    """The chat of a row: every field of its turns, and the other variables of the chat template.

    Raises:
        TrainingError: the row is not a chat; the message begins with `where`.
    """
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        value = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise TrainingError(f"{where}: found {value}; needed: 'messages', a list of turns with 'role' and 'content'")
    for place, turn in enumerate(messages, start=1):
        _check_turn(turn if isinstance(turn, dict) else {}, f"{where}, turn {place}")
    if not any(turn["role"] == "assistant" and _has_content(turn) for turn in messages):
        raise TrainingError(f"{where}: no turn of the assistant says anything, so there is nothing to learn")
    chat = {"messages": messages} | _variables(row, where)
    try:
        json.dumps(chat, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TrainingError(f"{where} has a value that JSON or UTF-8 has no form for: {error}") from error
    return chat


def _require(holds: bool, where: str, name: str, value: Any, accepted: str) -> None:
    if not holds:
        raise TrainingError(f"{where}: {name} {value!r}; accepted: {accepted}")


def _check_turn(turn: dict[str, Any], where: str) -> None:
    role, content, calls = turn.get("role"), turn.get("content"), turn.get("tool_calls")
    _require(role in ROLES, where, "role", role, ", ".join(ROLES))
    _require(calls is None or _are_objects(calls), where, "tool_calls is", calls, "a list of objects")
    only_calls = content is None and calls and role == "assistant"
    is_parts = isinstance(content, list) and content and all(map(_is_text_part, content))
    _require(bool(only_calls or is_parts or is_text(content)), where, "content is", content, "text")


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text"))


def _has_content(turn: dict[str, Any]) -> bool:
    content = turn.get("content") or ""
    parts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return bool(turn.get("tool_calls")) or any(part.strip() for part in parts)


def _variables(row: dict[str, Any], where: str) -> Chat:
    """``tools`` and ``chat_template_kwargs`` of a row that has them; ``documents`` becomes one of the latter."""
    tools, more = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):  # TRL accepts text too, because Arrow cannot store objects of different structure
        tools = parse_json(tools, f"{where}: tools", TrainingError)
    _require(tools is None or _are_objects(tools), where, "tools is", tools, "a list of objects")
    _require(more is None or isinstance(more, dict), where, "chat_template_kwargs is", more, "an object")
    if isinstance(row.get("documents"), list):
        more = {"documents": row["documents"], **(more or {})}
    return {name: value for name, value in (("tools", tools), ("chat_template_kwargs", more)) if value is not None}


def is_text(value: Any) -> bool:
    """Whether `value` is a string that can be encoded: JSON can contain half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def check_template(tokenizer: Any, model: str) -> None:
    """Raises:
    TrainingError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise TrainingError(
            f"the tokenizer of {model} has no chat template; accepted: --chat_template_path FILE.jinja, or a model "
            "whose template is to be taken over"
        )
