"""Saving of a trained model as a folder in the Hub's layout, as `namex-patch` writes it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule

from ..checkpoint.companions import TOKENIZER_CONFIG, carry, without_auto_map
from ..checkpoint.folder import OutputFolder, list_files
from ..checkpoint.header import read_header
from ..checkpoint.rope import both_forms
from ..checkpoint.shard import write_index, write_tensors
from ..defaults import SHARD_SIZE
from ..files import CARD, CONFIG, RECIPE, REPORT, SINGLE, STATISTICS, write_text
from ..models import remote_code
from ..recipe import Recipe
from ..record import Report
from ..report.card import card
from .bargain import LayerBargain
from .generation import carried_settings


def layer_records(bargains: list[LayerBargain], seconds: float) -> list[dict[str, Any]]:
    """The entries of a report, one for each layer.

    Args:
        seconds: time of all layers together.
    """
    mean = round(seconds / max(len(bargains), 1), 4)
    return [{"layer": each.layer, "games": each.record, "drift": each.drift, "seconds": mean} for each in bargains]


def save_trained(
    folder: OutputFolder,
    model: Any,
    tokenizer: Any,
    carried: Path,
    report: Report,
    bargains: list[LayerBargain],
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Write model, tokenizer, report and card; the folder becomes a model only when it is complete.

    Args:
        folder: locked by this run.
        carried: folder of the checkpoint that training began with, for its companions such as the licence.
        state_dict: the gathered parameters of a sharded model.

    Memory: a shard in the Hub's layout, beyond the model.
    """
    out, staged = folder.path, folder.state / "model"
    shutil.rmtree(staged, ignore_errors=True)
    with carried_settings(model, carried, staged):
        model.save_pretrained(staged, max_shard_size=SHARD_SIZE, state_dict=state_dict)
    tokenizer.save_pretrained(staged)
    settings = staged / TOKENIZER_CONFIG  # of a tokenizer that was opened without code
    settings.write_bytes(without_auto_map(settings.read_bytes()))
    carry(carried, out)
    config = both_forms(json.loads((staged / CONFIG).read_text("utf-8")))
    # torch creates the class of a sharded model, which must not be named in the configuration.
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
    if bargains:
        cosines = {f"layers.{each.layer}.cosines": each.cosines.contiguous() for each in bargains}
        write_tensors(out / STATISTICS, cosines)
    write_text(out / RECIPE, Recipe.from_stored(report.run["recipe"]).to_yaml(stored=True))
    write_text(out / CARD, card(report, config, out, carried))
    text = json.dumps(config, indent=2) + "\n"
    write_text(out / REPORT, replace(report, files=list_files(out, text, {})).to_json())
    folder.finish(text)
