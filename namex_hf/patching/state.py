"""What a run has finished, layer by layer, so that a killed one goes on where it was."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..checkpoint.header import read_metadata
from ..checkpoint.shard import write_tensors
from ..merging.experts import PROJECTIONS
from ..merging.propagation import Walk
from .added import KINDS

WALK, STREAM, BUDGET = "walk.safetensors", "stream.safetensors", "budget.safetensors"
RESULTS = (*(f"{kind}." for kind in KINDS), "new.")
"""How names of tensors begin that go into the result; the others of a layer are statistics."""


@dataclass(frozen=True)
class Stream:
    """Calibration text on its way through the model: hidden states on arrival at a layer."""

    layer: int
    hidden: torch.Tensor  # float32 [sequences, length, hidden]
    original: torch.Tensor | None = None  # as hidden, of the model that is patched, where layers aim at that
    walk: Walk | None = None  # the base expert that arrives with it


@dataclass(frozen=True)
class State:
    """The folder of a run's own files. Bases are kept unrounded: a resumed run is the undisturbed one, bit for bit."""

    folder: Path

    def layer_file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def save_layer(self, layer: int, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        _save(self.layer_file(layer), tensors, record)

    def save_walk(self, position: int, walk: Walk | None) -> None:
        """The walk on arrival at the ``position``-th MoE layer; None where that begins with its own base."""
        _save(self.folder / WALK, _tensors(walk), {"position": position})

    def load_walk(self) -> tuple[int, Walk | None]:
        """What was saved last; the first position where nothing was."""
        path = self.folder / WALK
        if not path.is_file():
            return 0, None
        position, tensors = json.loads(read_metadata(path)["record"])["position"], load_file(path)
        return position, _walk(tensors)

    def save_stream(self, stream: Stream) -> None:
        original = {} if stream.original is None else {"original": stream.original}
        tensors = {"hidden": stream.hidden, **original, **_tensors(stream.walk)}
        _save(self.folder / STREAM, tensors, {"layer": stream.layer})

    def load_stream(self) -> Stream | None:
        """What was saved last, in memory of its own: mapped tensors may be worked on with other roundings."""
        path = self.folder / STREAM
        if not path.is_file():
            return None
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        layer, hidden = json.loads(read_metadata(path)["record"])["layer"], tensors.pop("hidden")
        return Stream(layer, hidden, tensors.pop("original", None), _walk(tensors))

    def save_budget(self, record: list[dict[str, Any]]) -> None:
        """What was measured of each MoE layer, and how many experts it keeps."""
        _save(self.folder / BUDGET, {"experts": torch.tensor([layer["experts"] for layer in record])}, {"is": record})

    def load_budget(self) -> list[dict[str, Any]] | None:
        """None before it was measured."""
        path = self.folder / BUDGET
        return json.loads(read_metadata(path)["record"])["is"] if path.is_file() else None

    def records(self) -> list[dict[str, Any]]:
        """What was written down about each finished layer, in order."""
        return [json.loads(read_metadata(path)["record"]) for path in sorted(self.folder.glob("layer-*.safetensors"))]

    def statistics(self) -> dict[str, torch.Tensor]:
        """``layers.L.cosines`` of each finished layer, and ``layers.L.usage`` where text was read."""
        found: dict[str, torch.Tensor] = {}
        for path in sorted(self.folder.glob("layer-*.safetensors")):
            layer = json.loads(read_metadata(path)["record"])["layer"]
            found |= {
                f"layers.{layer}.{name}": t for name, t in load_file(path).items() if not name.startswith(RESULTS)
            }
        return found


def _tensors(walk: Walk | None) -> dict[str, torch.Tensor]:
    if walk is None:
        return {}
    assert walk.weights is not None
    return {**walk.base, **walk.momentum, "weights": walk.weights}


def _walk(tensors: dict[str, torch.Tensor]) -> Walk | None:
    """What `_tensors` made of one."""
    if not tensors:
        return None
    base, weights = {name: tensors.pop(name) for name in PROJECTIONS}, tensors.pop("weights")
    return Walk(base, weights, tensors)


def _save(path: Path, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    write_tensors(path, tensors, {"record": json.dumps(record)})
