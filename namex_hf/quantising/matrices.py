"""Which matrices of a checkpoint are quantised, and the bytes that it takes then."""

from dataclasses import dataclass, replace
from math import prod

from torch import nn

from ..checkpoint.header import TensorSpan
from ..checkpoint.layout import outline_in, per_expert
from ..checkpoint.source import Checkpoint
from ..families.outline import Outline, build
from .grid import stored_bits

LEFT = 16
"""Bits of every number that is not quantised."""
DENSE = 8
"""Bits of the linear modules beside the routed experts, whatever these have: every token passes through them, and they
are a small part of the bytes."""


@dataclass(frozen=True)
class Storage:
    """What a model takes, by formula."""

    routed: int
    """Numbers in the matrices of routed experts."""
    routed_bits: int
    """Bits of these matrices, scales and zeros included."""
    dense: int
    dense_bits: int
    """The same of the other quantised matrices."""
    other_bytes: int
    """Of all other tensors, in 16 bit."""

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return (self.routed_bits + self.dense_bits + 7) // 8 + self.other_bytes

    @property
    def unquantised(self) -> "Storage":
        """The same model with all its numbers in 16 bit."""
        return replace(self, routed_bits=self.routed * LEFT, dense_bits=self.dense * LEFT)


@dataclass(frozen=True)
class Matrices:
    """A checkpoint, and which of its tensors are quantised: routed experts, and the linear modules of decoder layers.

    Not quantised: embedding, head, norms, biases, routers, a shared expert's gate, and what is no linear module.
    """

    checkpoint: Checkpoint
    outline: Outline
    spans: dict[str, TensorSpan]
    """Of all tensors, by name in files."""
    dense: frozenset[str]
    """Names in files of the linear modules."""

    def names(self, layer: int) -> list[str]:
        """Names in files of what is quantised of a decoder layer."""
        experts = self.outline.experts(layer) if layer in self.outline.blocks else ()
        return [*sorted(name for name in self.dense if self.outline.layer_of(name) == layer), *experts]

    def storage(self, bits: int, width: int | None = None) -> Storage:
        """What the model takes.

        Args:
            bits: of a level of routed experts.
            width: of these, if not their own.
        """
        routed = [self._shape(name, width) for name in self.outline.places]
        dense = [self.spans[name].shape for name in self.dense]
        others = [
            span.shape for name, span in self.spans.items() if name not in self.dense | self.outline.places.keys()
        ]
        return Storage(
            routed=sum(map(prod, routed)),
            routed_bits=sum(stored_bits(rows, columns, bits) for rows, columns in routed),
            dense=sum(map(prod, dense)),
            dense_bits=sum(stored_bits(rows, columns, DENSE) for rows, columns in dense),
            other_bytes=sum(map(prod, others)) * LEFT // 8,
        )

    def _shape(self, name: str, width: int | None) -> tuple[int, ...]:
        """Of a matrix of a routed expert of some width."""
        rows, columns = self.spans[name].shape
        if width is None:
            return rows, columns
        return (rows, width) if self.outline.places[name][2] == "down_proj" else (width, columns)


def matrices_of(checkpoint: Checkpoint) -> Matrices:
    """Raises:
    FamilyError, CheckpointError: as `outline_in` and `per_expert`.
    """
    outline = outline_in(checkpoint)
    model = build(checkpoint.config)
    gates = {gate for layer in outline.blocks if (gate := outline.shared(layer).get("gate"))}
    left = gates | {outline.router(layer) for layer in outline.blocks}
    dense = {
        f"{path}.{part}.weight"
        for path in outline.decoder_layers
        for part, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear)
    }
    return Matrices(checkpoint, outline, per_expert(checkpoint, outline), frozenset(map(outline.file, dense - left)))
