"""Shards of a result whose layers have fewer experts: they are written anew, whole layers at a time."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.bytes import Reader
from ..checkpoint.header import TensorSpan
from ..checkpoint.shard import Item, shard_names, write_shard
from ..errors import FamilyError
from ..progress import FINISHED, ProgressCallback, ProgressEvent
from .finite import is_finite
from .plan import Plan, constant_items
from .state import State

logger = logging.getLogger(__name__)
NUMBERS = re.compile(r"(\d+)")


def write_packs(
    plan: Plan,
    folder: Path,
    reader: Reader,
    layer_items: Callable[[int], list[Item]],
    state: State,
    progress: ProgressCallback,
) -> list[str]:
    """Write the shards of the result, and return their names; those of a killed run stay.

    Args:
        layer_items: router and experts of a MoE layer, and what else of it takes the place of a tensor of its name.
    """
    packs = pack(items_of(plan, layer_items, reader), plan.outline.layer_of, plan.shard_size)
    names = shard_names(len(packs))
    for items, name in zip(packs, names, strict=True):
        target = folder / name
        present = {plan.outline.layer_of(item.name) for item in items}
        layers = [layer for layer in plan.shape.layers if layer in present]
        if target.is_file() and all(state.layer_file(layer).is_file() for layer in layers):
            logger.info("%s is there; continues after it", name)
            for layer in layers:
                progress(ProgressEvent(FINISHED, layer, amount=plan.layer_bytes(layer), resumed=True))
        else:
            write_shard(target, items, reader, state.record_shard)
    return names


def items_of(plan: Plan, layer_items: Callable[[int], list[Item]], reader: Reader) -> list[Item]:
    """All tensors of the result in their natural order, layer by layer. Args: layer_items, as `write_packs`."""
    by_name = {name: Item.of(name, span) for name, span in plan.spans.items() if name not in plan.outline.places}
    for layer in plan.shape.layers:
        by_name |= {item.name: item for item in layer_items(layer)}
    items = [*by_name.values(), *plan.untied]
    if plan.export_as:
        items = reexpressed(plan, items, reader)
    return sorted(items, key=lambda item: natural(item.name))


def reexpressed(plan: Plan, items: list[Item], reader: Reader) -> list[Item]:
    """The same tensors in the form of another family."""
    form = plan.form
    assert form is not None
    result = constant_items(plan)
    for item in items:
        renamed = replace(item, name=form.rename(item.name))
        if form.doubled(item.name):
            assert isinstance(item.source, TensorSpan)
            renamed = replace(renamed, source=partial(_twice, reader, item.name, item.source))
        result.append(renamed)
    return result


def _twice(reader: Reader, name: str, span: TensorSpan) -> torch.Tensor:
    doubled = reader.read(span) * 2
    if not is_finite(doubled):
        raise FamilyError(f"--export-as writes twice {name}, which is infinite in {span.dtype}; convert it to bfloat16")
    return doubled


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key by which layer 10 comes after layer 9."""
    return tuple((not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in NUMBERS.split(name))


def pack(items: list[Item], layer_of: Callable[[str], int | None], shard_size: int) -> list[list[Item]]:
    """Fill shards up to a size. A layer is never split, so that it is merged once, even after a kill."""
    units: dict[int | str, list[Item]] = {}
    for item in items:
        layer = layer_of(item.name)
        units.setdefault(item.name if layer is None else layer, []).append(item)
    packs: list[list[Item]] = [[]]
    size = 0
    for unit in units.values():
        more = sum(item.size for item in unit)
        if packs[-1] and size + more > shard_size:
            packs.append([])
            size = 0
        packs[-1] += unit
        size += more
    return packs
