"""A trained model becomes a folder in the Hub's layout, as `namex-patch` writes them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule

from ..checkpoint.companions import carry
from ..checkpoint.folder import OutputFolder, list_files
from ..checkpoint.header import read_header
from ..checkpoint.rope import both_forms
from ..checkpoint.shard import write_index, write_tensors
from ..files import CARD, CONFIG, RECIPE, REPORT, SINGLE, STATISTICS, write_text
from ..models import remote_code
from ..recipe import Recipe
from ..report.card import card
from ..report.report import Report
from .bargain import Settled
from .generation import carried_settings

METADATA = {"format": "pt"}


def layer_records(settled: list[Settled], seconds: float) -> list[dict[str, Any]]:
    """As a report has them.

    Args:
        seconds: that all layers took together.
    """
    return [
        {"layer": one.layer, "games": one.record, "drift": one.drift, "seconds": round(seconds / len(settled), 4)}
        for one in settled
    ]


def save_trained(
    folder: OutputFolder,
    model: Any,
    tokenizer: Any,
    carried: Path,
    report: Report,
    settled: list[Settled],
    state_dict: dict[str, Any] | None = None,
    shard_size: str = "5GB",
) -> None:
    """Write model, tokenizer, report and card; the folder is no model until all of it is there.

    Args:
        folder: claimed.
        carried: folder of the checkpoint that training began with, for its licence and the like.
        state_dict: gathered, where the model is sharded.

    Memory: one shard in the Hub's layout, beyond the model.
    """
    out, staged = folder.path, folder.state / "model"
    shutil.rmtree(staged, ignore_errors=True)
    with carried_settings(model, carried, staged):
        model.save_pretrained(staged, max_shard_size=shard_size, state_dict=state_dict)
    tokenizer.save_pretrained(staged)
    carry(carried, out)
    config = both_forms(json.loads((staged / CONFIG).read_text("utf-8")))
    # A sharded model's class is one that torch has made, with files of its own.
    stock = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    code = remote_code(config["model_type"])
    config |= {"architectures": [stock.__name__], **({"auto_map": code.auto_map} if code.files else {})}
    if (staged / SINGLE).is_file():
        spans = read_header(staged / SINGLE)
        write_index(out, dict.fromkeys(spans, SINGLE), sum(span.size for span in spans.values()))
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        if path.name != CONFIG and path.suffix != ".py":
            place = out / path.relative_to(staged)
            place.parent.mkdir(exist_ok=True)
            path.replace(place)
    for file in code.files:
        write_text(out / file.name, file.read_text("utf-8"))
    if settled:
        cosines = {f"layers.{one.layer}.cosines": one.cosines.contiguous() for one in settled}
        write_tensors(out / STATISTICS, cosines, METADATA)
    write_text(out / RECIPE, Recipe.from_stored(report.run["recipe"]).to_yaml(stored=True))
    write_text(out / CARD, card(report, config, out, carried))
    text = json.dumps(config, indent=2) + "\n"
    write_text(out / REPORT, replace(report, files=list_files(out, text, {})).to_json())
    folder.finish(text)
