"""What a run has finished, layer by layer, so that a killed one goes on where it was.

Every file carries the hash of what is in it. Where one of them is damaged, the run begins anew: the calibration text
and the base expert on their way through the model depend on all layers below.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checkpoint.header import read_metadata
from ..checkpoint.identity import DIGESTS, HEADER, Identity, combined, hash_header, hash_weights
from ..checkpoint.shard import write_tensors
from ..errors import CheckpointError
from ..files import HASH, hash_bytes, read_checked, write_checked
from ..merging.weightings import FALLBACK
from .result import LayerResult, PipelineState, SavedResult

ARRIVED, BUDGET, SHARDS = "arrived.safetensors", "budget.safetensors", "shards.json"
FORMAT = "2"
"""Of these files; release 0.1.0 stated none. A run with files of another format begins anew."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """The folder of a run's own files. Bases are not rounded: a resumed run is the undisturbed one, bit for bit.

    Args:
        identity: of the source, whose hashes so far are saved before results of its bytes.
    """

    folder: Path
    identity: Identity
    _lock: Lock = field(default_factory=Lock)  # shards are written by two threads

    def is_damaged(self, layers: tuple[int, ...]) -> bool:
        """Whether a file of the state, or a shard that the run has written, is not as it was written, or is gone.

        Args:
            layers: the MoE layers of the model.
        """
        files = [self.folder / name for name in (ARRIVED, BUDGET)] + self._layer_files()
        lists = [self.folder / name for name in (SHARDS, DIGESTS)]
        return (
            any(path.exists() and not _is_whole(path) for path in files)
            or any(path.exists() and read_checked(path) is None for path in lists)
            or any(self._differs(name, listed) for name, listed in self.shards().items())
            or any(path.name not in self.shards() for path in self.folder.parent.glob("model*.safetensors"))
            or any(not self.layer_file(layer).exists() for layer in self._passed(layers))
        )

    def _passed(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """The MoE layers that the base expert or the text has passed through."""
        arrived = self.arrived()
        return tuple(layer for layer in layers if layer < arrived)

    def _differs(self, name: str, listed: dict[str, Any]) -> bool:
        path = self.folder.parent / name
        if not path.exists():
            return False
        if path.stat().st_size != listed["bytes"]:
            return True
        try:
            if HASH in listed:
                return hash_weights(path) != listed[HASH]
            source = self.identity.weights[listed["copy_of"]]  # compared when the hash of the source is known
            return hash_header(path) != self.identity.digests.read(source, HEADER)
        except CheckpointError:
            return True

    def record_shard(self, path: Path, listed: dict[str, Any]) -> None:
        """Take down size and hash of a shard, or which shard of the source it is a copy of."""
        with self._lock:
            write_checked(self.folder / SHARDS, self.shards() | {path.name: listed})

    def shards(self) -> dict[str, dict[str, Any]]:
        """What was taken down of each shard."""
        return read_checked(self.folder / SHARDS) or {}

    def _layer_files(self) -> list[Path]:
        return sorted(self.folder.glob("layer-*.safetensors"))

    def layer_file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def saved(self, layer: int) -> SavedResult:
        return SavedResult(layer, self.layer_file(layer))

    def save_layer(self, result: LayerResult, size: int) -> None:
        """Args: size, bytes of the source's experts."""
        self.identity.save_digests(self.folder)
        record = {**result.record, "bytes": size}
        _save(self.layer_file(result.layer), result.tensors(), record)
        _log_decisions(record)

    def save(self, state: PipelineState) -> None:
        """What the next layer depends on."""
        _save(self.folder / ARRIVED, state.tensors(), {"layer": state.layer})

    def load(self) -> PipelineState:
        """What was saved last, in memory of its own: mapped tensors may be worked on with other roundings."""
        path = self.folder / ARRIVED
        if not path.is_file():
            return PipelineState()
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        return PipelineState.of(self.arrived(), tensors)

    def arrived(self) -> int:
        """The decoder layer where the next work is."""
        path = self.folder / ARRIVED
        return int(_record(path)["layer"]) if path.is_file() else 0

    def save_budget(self, record: list[dict[str, Any]]) -> None:
        """What was measured of each MoE layer, and how many experts it keeps."""
        _save(self.folder / BUDGET, {"experts": torch.tensor([layer["experts"] for layer in record])}, {"is": record})

    def load_budget(self) -> list[dict[str, Any]] | None:
        """None before it was measured."""
        path = self.folder / BUDGET
        return _record(path)["is"] if path.is_file() else None

    def records(self) -> list[dict[str, Any]]:
        """What was written down about each finished layer, in order."""
        return [_record(path) for path in self._layer_files()]

    def statistics(self) -> dict[str, torch.Tensor]:
        """``layers.L.cosines`` of each finished layer, and ``layers.L.usage`` where text was read."""
        statistics: dict[str, torch.Tensor] = {}
        for path in self._layer_files():
            statistics |= SavedResult(_record(path)["layer"], path).statistics()
        return statistics


def _log_decisions(record: dict[str, Any]) -> None:
    """Say what was decided for a layer."""
    layer, statuses = record["layer"], Counter(game["status"] for game in record["games"])
    if groups := record.get("groups"):
        logger.info("layer %d: %d experts in %d groups: %s", layer, sum(map(len, groups)), len(groups), groups)
    if fallbacks := statuses[FALLBACK]:
        logger.warning("layer %d: uniform weights in place of %d of %d bargains", layer, fallbacks, statuses.total())


def _save(path: Path, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    text = json.dumps(record)
    write_tensors(path, tensors, metadata={"record": text, "format": FORMAT, HASH: _hash(text, tensors)})


def _hash(record: str, tensors: dict[str, torch.Tensor]) -> str:
    """Of everything in a file of the state."""
    parts = [hash_bytes(record.encode())]
    for name, tensor in sorted(tensors.items()):
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        parts.append(hash_bytes(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), data))
    return combined(parts)


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        tensors = load_file(path)  # which looks at the length of the header
        metadata = read_metadata(path)
        return metadata["format"] == FORMAT and metadata[HASH] == _hash(metadata["record"], tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        return False


def _record(path: Path) -> Any:
    return json.loads(read_metadata(path)["record"])
