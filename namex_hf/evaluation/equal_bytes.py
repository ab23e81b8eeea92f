"""Equal bytes: the original and each smaller model in few bits, as further cells of a comparison."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..quantising.matrices import LEFT, Storage
from ..recipe import Recipe
from .rows import Result, Row, row_of

BITS = (8, 4, 3)
"""Of every model."""
FEWEST = 2
"""Of the original alone, whose bytes smaller models reach with more bits."""


@dataclass(frozen=True)
class Quantising:
    """How the matrices of a model are quantised."""

    bits: int
    quantiser: str
    """One of `QUANTISERS`."""
    text: Recipe | None = None
    """A recipe that reads the text for GPTQ; None: no text."""

    @property
    def weights(self) -> str:
        """In words."""
        return f"{self.bits} bit, {self.quantiser}"

    def identity(self, text: Mapping[str, Any] | None) -> dict[str, Any]:
        """What determines the result besides the model, plain. Args: text, the identity of the text."""
        return {"bits": self.bits, "quantiser": self.quantiser, **({"calibration": dict(text)} if text else {})}


def quantisings(quantisers: Collection[str], text: Recipe | None, is_original: bool) -> list[Quantising]:
    """All that a model gets. Args: text, a recipe that reads the text for GPTQ."""
    bits = (*BITS, FEWEST) if is_original else BITS
    return [Quantising(b, name, text if name == "gptq" else None) for b in bits for name in quantisers]


@dataclass(frozen=True)
class SizedRow:
    """A model in one form of its weights."""

    row: Row
    weights: str
    bits: float
    """Of all routed experts, scales and zeros included, a routed parameter of the original."""
    bytes: int
    """Of all tensors; what is not quantised has 16 bit a number."""
    best: tuple[str, ...] = ()
    """In which of ``perplexity`` and ``answers`` no row of at most as many bytes is better."""


Forms = Sequence[tuple[Quantising, str]]
"""The quantised forms of a model, and the labels of their cells."""


def sized_rows(models: Mapping[str, Forms], results: Mapping[str, Result], original: str) -> list[SizedRow]:
    """A row for every model as it is and for each of its quantised forms, by falling bytes.

    Args:
        models: by label, the original among them.
        results: by label. A model of which no quantised form was measured is left out.
        original: its label.
    """
    stored = {name: Storage(**result["stored"]) for name, result in results.items() if "stored" in result}
    counts = [stored[name].routed for _, name in models.get(original, ()) if name in stored]
    if not counts:
        return []
    found: list[SizedRow] = []

    def add(label: str, cell: str, weights: str, storage: Storage) -> None:
        row = replace(row_of(cell, results[cell], results[original]), title=label)
        found.append(SizedRow(row, weights, storage.routed_bits / counts[0], storage.bytes))

    for label, forms in models.items():
        known = [(how, name) for how, name in forms if name in stored]
        if known:
            add(label, label, f"{LEFT} bit", stored[known[0][1]].unquantised)
        for how, name in known:
            add(label, name, how.weights, stored[name])
    return [replace(one, best=_best(one, found)) for one in sorted(found, key=lambda one: -one.bytes)]


def _best(one: SizedRow, rows: Sequence[SizedRow]) -> tuple[str, ...]:
    rivals = [other.row for other in rows if other.bytes <= one.bytes]
    best = {
        "perplexity": one.row.ratio <= min(row.ratio for row in rivals),
        "answers": one.row.exact is not None and one.row.exact >= max(row.exact or 0 for row in rivals),
    }
    return tuple(name for name, is_best in best.items() if is_best)
