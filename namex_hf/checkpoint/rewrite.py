"""Rewriting of a model's files without some of its tensors."""

import json
from pathlib import Path
from typing import Any

from ..files import HASH, INDEX, REPORT, hash_file, write_text
from .bytes import Reader
from .shard import Item, write_index, write_shard
from .source import Checkpoint


def rewrite(checkpoint: Checkpoint, left_out: tuple[str, ...], folder: Path) -> None:
    """Rewrite weights, index and report in a folder of links to the files of a checkpoint.

    Args:
        left_out: names of the tensors to omit.
        folder: nothing outside it is written.
    """
    spans = {name: span for name, span in checkpoint.spans.items() if name not in left_out}
    listed: dict[str, dict[str, Any]] = {}
    emptied = []
    with Reader() as reader:
        for shard in sorted({checkpoint.spans[name].file for name in left_out}):
            (folder / shard.name).unlink()
            places = sorted((span.begin, name) for name, span in spans.items() if span.file == shard)
            items = [Item.of(name, spans[name]) for _, name in places]
            if items:
                write_shard(folder / shard.name, items, reader, lambda path, entry: listed.update({path.name: entry}))
            else:
                emptied.append(shard.name)
    write_index(folder, {name: span.file.name for name, span in spans.items()}, sum(s.size for s in spans.values()))
    listed[INDEX] = {"bytes": (folder / INDEX).stat().st_size, HASH: hash_file(folder / INDEX)}
    report = json.loads((folder / REPORT).read_text("utf-8"))
    files = {name: listed.get(name, entry) for name, entry in report.get("files", {}).items() if name not in emptied}
    write_text(folder / REPORT, json.dumps(report | {"files": files}, indent=1) + "\n")
