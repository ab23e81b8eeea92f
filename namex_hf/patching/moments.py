"""Moments of neurons that a run measured on its text: results of other widths from the same reading."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.identity import hash_weights
from ..checkpoint.shard import write_tensors
from ..errors import CheckpointError, RecipeError
from ..families import MoeShape
from ..files import HASH, MOMENTS, read_checked, read_json, write_checked, write_text
from ..merging.experts import Expert
from ..recipe import Recipe

RECORD, COMPLETE = "record.json", "complete"
HASHES = "hashes"
RECORDED = ("usage", "mass", "peaks", "super_experts")


@dataclass(frozen=True)
class SavedMoments:
    """Of a layer, as `merging.moments.Moments`. One expert's are read at a time."""

    folder: Path
    record: dict[str, Any]
    device: str
    hashes: dict[str, str]

    def tokens(self, number: int) -> int:
        return int(self.record["usage"][number])

    def of(self, number: int, expert: Expert) -> tuple[Tensor, Tensor]:
        file = _file(self.folder, number)
        if not file.is_file() or hash_weights(file) != self.hashes.get(file.name):
            raise CheckpointError(f"{file} is not as it was written; make the moments anew, in a new folder")
        saved = load_file(file, device=self.device)
        return saved["moment"], saved["peak"]


@dataclass(frozen=True)
class MomentsFolder:
    """A folder of moments: a subfolder a layer, a file an expert, ``4 width^2`` bytes each.

    Args:
        run: what they depend on.
        is_complete: whether all were there when this run began: then no text is read, and nothing is written.
    """

    folder: Path
    run: dict[str, Any]
    is_complete: bool
    device: str
    hashes: dict[Path, str] = field(default_factory=dict)  # of the files that this run has written

    def begin(self) -> None:
        """Make the folder, and say of which run it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / COMPLETE).unlink(missing_ok=True)
        write_text(self.folder / MOMENTS, json.dumps(self.run, indent=1))

    def end(self) -> None:
        """Take down that all are saved; a run that is killed before reads the text again, and records its errors."""
        write_text(self.folder / COMPLETE, "")

    def layer(self, layer: int) -> SavedMoments:
        folder = _layer_folder(self.folder, layer)
        record = read_checked(folder / RECORD)
        return SavedMoments(folder, {name: record[name] for name in RECORDED}, self.device, record.get(HASHES, {}))

    def save(self, layer: int, number: int, moment: Tensor, peak: Tensor) -> None:
        file = _file(_layer_folder(self.folder, layer), number)
        write_tensors(file, {"moment": moment.cpu(), "peak": peak.cpu()}, self._written)

    def finish(self, layer: int, record: dict[str, Any]) -> None:
        """Take down that all of a layer's are saved. Args: record, the layer's in the report."""
        folder = _layer_folder(self.folder, layer)
        hashes = {path.name: written for path, written in self.hashes.items() if path.parent == folder}
        write_checked(folder / RECORD, {**{name: record[name] for name in RECORDED}, HASHES: hashes})

    def _written(self, path: Path, listed: Mapping[str, Any]) -> None:
        self.hashes[path] = listed[HASH]


def check_reads_moments(recipe: Recipe, option: str) -> None:
    """Raises:
    RecipeError: the recipe needs more of the text than moments.
    """
    if not recipe.reads_moments_alone:
        stated = ", ".join(
            f"{name}={recipe.to_dict()[name]}" for name in ("merge", "fit", "sweeps", "calibrate", "routing")
        )
        raise RecipeError(
            f"{option} stands for the text where neurons are chosen by the original's activations alone: merge "
            f"'narrow', sweeps 0, calibrate 'before', fit 'none' and routing 'linear'; found {stated}"
        )


def shape_record(shape: MoeShape) -> dict[str, Any]:
    """Of a model, what another must have too that is cut by the same moments."""
    return {"layers": list(shape.layers), "experts": shape.experts, "hidden": shape.hidden, "width": shape.width}


def moments_of_another(folder: Path, recipe: Recipe, shape: MoeShape) -> MomentsFolder:
    """The moments of another model, or of another text.

    Raises:
        RecipeError: the recipe needs more than moments.
        CheckpointError: they are not all there, or of a model of another shape.
    """
    check_reads_moments(recipe, "--like")
    if not is_complete(folder, shape.layers):
        raise CheckpointError(f"--like {folder} has no moments of all layers; accepted: a folder filled by --moments")
    run, expected = read_json(folder / MOMENTS), shape_record(shape)
    for name, number in expected.items():
        if (recorded := run["shape"][name]) != number:
            raise CheckpointError(f"--like {folder} is of a model with {name} {recorded}; this one has {number}")
    return MomentsFolder(folder, run, True, recipe.device)


def is_complete(folder: Path, layers: Iterable[int]) -> bool:
    """Whether the moments of all layers are there."""
    records = (_layer_folder(folder, layer) / RECORD for layer in layers)
    return (folder / COMPLETE).is_file() and all(map(read_checked, records))


def _layer_folder(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}"


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"
