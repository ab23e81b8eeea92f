"""A patched folder as its pictures need it: the record, the statistics, and its experts layer by layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.bytes import Reader
from ..checkpoint.folder import check_whole
from ..checkpoint.header import TensorSpan, read_header
from ..checkpoint.layout import outline_in, per_expert
from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import CheckpointError
from ..families import MoeShape
from ..families.outline import Outline
from ..files import REPORT, STATISTICS, locate, read_json
from ..merging.experts import Expert
from ..recipe import Recipe
from ..record import Report
from .rebuild import has_recipe_alone, layer_experts, rebuild, shared_expert

ACCEPTED = "accepted: a finished folder of namex-patch or sft_smoltalk.py"


@dataclass(frozen=True)
class PatchedFolder:
    """What a patched folder says of itself; its tensors are read when they are asked for."""

    path: Path
    report: Report
    recipe: Recipe
    checkpoint: Checkpoint
    outline: Outline  # of the folder's own experts: fewer than the original's under ``grouped``
    spans: dict[str, TensorSpan]  # under per-expert names
    cosines: dict[int, torch.Tensor]  # by layer, float32 [games, N, N]
    usage: dict[int, torch.Tensor]  # by layer, tokens that each of the original's experts received, int64 [N]

    def record(self, layer: int) -> dict[str, Any]:
        """The report's record of a MoE layer.

        Raises:
            CheckpointError: there is none.
        """
        for record in self.report.layers:
            if record["layer"] == layer:
                return record
        raise CheckpointError(f"{REPORT} has no record of layer {layer}, of which {STATISTICS} has cosines")

    @property
    def shape(self) -> MoeShape:
        return self.outline.shape

    def experts(self, reader: Reader, layer: int) -> Expert:
        """The routed experts of a layer, stacked, in their own dtype."""
        return layer_experts(reader, self.spans, self.outline, layer)

    def shared(self, reader: Reader, layer: int) -> Expert:
        """The shared expert of a layer."""
        return shared_expert(reader, self.spans, self.outline, layer)

    def domain_grams(self, layer: int) -> torch.Tensor | None:
        """Gram matrices of the domain vectors of a layer's games, float64 ``[games, N, N]``, from norms and cosines.

        None where the layer played no game around one base expert.
        """
        alike = self.cosines.get(layer)
        if alike is None:
            return None
        games = self.record(layer)["games"]
        if len(games) != len(alike) or any("norms" not in game or "members" in game for game in games):
            return None
        norms = torch.tensor([game["norms"] for game in games], dtype=torch.float64)
        if norms.shape != alike.shape[:2]:
            raise CheckpointError(
                f"{REPORT}: layer {layer} has norms {list(norms.shape)}; {STATISTICS} has cosines {list(alike.shape)}"
            )
        return norms[:, :, None] * alike.double() * norms[:, None, :]


def open_patched(path: Path) -> PatchedFolder:
    """Read the report, the statistics and all headers of a patched folder; where there is no report, rebuild it.

    Raises:
        CheckpointError, FamilyError, RecipeError: it is none, or damaged; one line that names the file.
    """
    config = read_json(path / "config.json")
    if not isinstance(config.get("namex"), dict):
        raise CheckpointError(f"{path}: config.json has no recipe under 'namex'; {ACCEPTED}")
    report = rebuild(path) if has_recipe_alone(path) else Report.from_file(locate(path, REPORT))
    check_whole(path)
    checkpoint = open_checkpoint(path)
    outline = outline_in(checkpoint)
    recipe = Recipe.from_stored(config["namex"])
    tensors = _statistics(locate(path, STATISTICS))
    cosines = {layer: t for (layer, what), t in tensors.items() if what == "cosines"}
    usage = {layer: t for (layer, what), t in tensors.items() if what == "usage"}
    spans = per_expert(checkpoint, outline)
    return PatchedFolder(path, report, recipe, checkpoint, outline, spans, cosines, usage)


def _statistics(path: Path) -> dict[tuple[int, str], torch.Tensor]:
    """``layers.L.WHAT`` by layer and name; nothing where no game was played and no text read."""
    if not path.is_file():
        return {}
    tensors = {}
    with Reader() as reader:
        for name, span in read_header(path).items():
            match name.split("."):
                case ["layers", layer, what] if layer.isdecimal():
                    tensors[int(layer), what] = reader.read(span)
                case _:
                    raise CheckpointError(f"{path.name}: tensor {name}; accepted: layers.L.cosines and layers.L.usage")
    return tensors
