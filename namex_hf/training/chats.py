"""Chats to train on: read, checked, and counted."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..calibration.hub_source import NAME as HUB_NAME
from ..checkpoint.hub import hub_client
from ..errors import MissingExtraError, TrainingError
from ..files import bounded_lines, open_regular, parse_json

PACKAGED = Path(__file__).parent.parent / "packaged" / "chats"
ROLES = ("system", "user", "assistant", "tool")
COUNTED = 2000
"""Chats whose lengths are told."""
Chat = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Chats:
    """What is trained on, and what is held back to be scored on, each a `datasets.Dataset` with ``messages``."""

    train: Any
    held_out: Any
    name: str
    """Of the data, never a path; of a Hub data set with its commit."""
    sha256: str | None
    """Of a local file's chats."""


def load_chats(source: str | None, config: str | None, splits: tuple[str, str], held_out: int, seed: int) -> Chats:
    """Read the chats that a user names.

    Args:
        source: None: the packaged chats; a ``.jsonl`` or ``.parquet`` file with `messages`; or a Hub data set.
        config: of a Hub data set.
        splits: to train on and to score on. A local file has neither: some chats, drawn by `seed`, are held back.
        held_out: chats to score on, at least 2; of a local file not more than a tenth.

    Memory: all chats of a local file.

    Raises:
        TrainingError: nothing of that name, a line or row that is no chat (by its number), too few chats.
        MissingExtraError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading chats", "train") from error
    path = None if source is None else Path(source)
    if path is None or path.is_file():
        if config is not None:
            raise TrainingError(f"--dataset_config {config} belongs to a Hub data set; found {path or 'none'}")
        if path is None:
            rows = list(file_chats(PACKAGED / "train.jsonl"))
            back = list(file_chats(PACKAGED / "held_out.jsonl"))[:held_out]
        else:
            rows = list(file_chats(path))
            count = min(held_out, len(rows) // 10)
            order = np.random.default_rng(seed).permutation(len(rows)).tolist()
            back = [rows[index] for index in sorted(order[:count])]
            rows = [rows[index] for index in sorted(order[count:])]
        if len(back) < 2:
            raise TrainingError(f"{path}: {len(rows) + len(back)} chats; at least 20 are needed to hold two back")
        digest = hashlib.sha256(json.dumps([rows, back]).encode()).hexdigest()
        name = "packaged" if path is None else path.name
        return Chats(datasets.Dataset.from_list(rows), datasets.Dataset.from_list(back), name, digest)
    return _of_hub(str(source), config, splits, held_out)


def _of_hub(name: str, config: str | None, splits: tuple[str, str], held_out: int) -> Chats:
    import datasets
    from huggingface_hub import dataset_info

    if not HUB_NAME.fullmatch(name) or ":" in name:
        raise TrainingError(f"--dataset_name {name}: accepted: a .jsonl or .parquet file, or a Hub data set OWNER/NAME")
    try:
        with hub_client():
            commit = dataset_info(name).sha
        train, back = (datasets.load_dataset(name, config, split=split, revision=commit) for split in splits)
    except Exception as error:  # what the library and the network raise is no closed set
        reason = f"{type(error).__name__}: {error}"
        raise TrainingError(f"--dataset_name {name} cannot be read as a Hub data set: {reason}") from error
    if "messages" not in train.column_names:
        raise TrainingError(f"{name} has the columns {', '.join(train.column_names)}; 'messages' is needed")
    chosen = back.select(range(min(held_out, len(back)))).select_columns("messages")
    stated = name if config is None else f"{name}:{config}"
    return Chats(train.select_columns("messages"), chosen, f"{stated}@{commit}", None)


def file_chats(path: Path) -> Iterator[Chat]:
    """The chats of a file, a line or a row each.

    Raises:
        TrainingError: naming file and line of what is none.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise TrainingError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from error
        yield from (checked(row, f"{path} row {number}") for number, row in enumerate(rows, start=1))
    elif path.suffix in (".jsonl", ".json"):
        with open_regular(path, TrainingError) as file:
            for number, line in enumerate(bounded_lines(file, path, TrainingError), start=1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield checked(parse_json(line, where, TrainingError), where)
    else:
        raise TrainingError(f"{path}: accepted: .jsonl, a chat a line, or .parquet with a column 'messages'")


def checked(row: Any, where: str) -> Chat:
    """A row's chat.

    Raises:
        TrainingError: naming `where` and what is wrong.
    """
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        found = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise TrainingError(f"{where}: found {found}; needed: 'messages', a list of turns with 'role' and 'content'")
    for place, turn in enumerate(messages, start=1):
        turn = turn if isinstance(turn, dict) else {}
        if turn.get("role") not in ROLES:
            raise TrainingError(f"{where}, turn {place}: role {turn.get('role')!r}; accepted: {', '.join(ROLES)}")
        if not is_text(turn.get("content")):
            raise TrainingError(f"{where}, turn {place}: content is {turn.get('content')!r}; accepted: text")
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        raise TrainingError(f"{where}: no turn of the assistant says anything, so there is nothing to learn")
    return {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in messages]}


def is_text(found: Any) -> bool:
    """Whether it is a string that some encoding has: JSON can spell half a surrogate pair."""
    return isinstance(found, str) and not any("\ud800" <= letter <= "\udfff" for letter in found)


def check_template(tokenizer: Any, model: str) -> None:
    """Raises:
    TrainingError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise TrainingError(
            f"the tokenizer of {model} has no chat template; accepted: --chat_template_path FILE.jinja, or a model "
            "whose template is to be taken over"
        )


def lengths(chats: Any, tokenizer: Any, template: str | None) -> list[int]:
    """Tokens of each of the first `COUNTED` chats, under the template."""
    some = chats.select(range(min(COUNTED, len(chats))))
    return [
        len(tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"])
        for messages in some["messages"]
    ]


def length_table(counts: Sequence[int], every: int, longest: int) -> Table:
    """Args:
    counts: tokens of the chats looked at.
    every: all chats.
    longest: tokens of a sequence.
    """
    table = Table(title="chats to train on", show_header=False)
    of = "" if len(counts) == every else f" (lengths: of the first {len(counts):,})"
    table.add_row("chats", f"{every:,}{of}")
    quantiles = np.quantile(counts, (0.5, 0.9)).round().astype(int).tolist()
    table.add_row(
        "tokens a chat", f"mean {np.mean(counts):.0f}, median {quantiles[0]}, nine in ten up to {quantiles[1]}"
    )
    table.add_row("the longest", f"{max(counts):,}")
    cut = sum(count > longest for count in counts)
    table.add_row(f"longer than a sequence of {longest:,}", f"{cut:,}, which lose their end" if cut else "none")
    table.add_row("tokens in all", f"{'about ' if of else ''}{np.mean(counts) * every:,.0f}")
    return table
