"""Shards of the source that are carried over into the result, and what layers have more than before."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

import torch

from ..checkpoint.bytes import Reader, copy_file
from ..checkpoint.header import TensorSpan
from ..checkpoint.shard import Item, write_shard
from ..merging.alignment import permuted_matrix
from ..progress import ProgressCallback, ProgressEvent
from .plan import Plan
from .state import State


@contextmanager
def carried_beside(
    plan: Plan, folder: Path, names: list[str], state: State, progress: ProgressCallback
) -> Iterator[None]:
    """Carry the shards over while the layers are worked on: one waits for the disk, the other for the processor."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(carry_over, plan, folder, names, state, progress, stop)
        try:
            yield
        except BaseException:
            stop.set()  # bad input or an interrupt: no further shard is begun
            raise
        copying.result()


def carry_over(
    plan: Plan, folder: Path, names: list[str], state: State, progress: ProgressCallback, stop: Event | None = None
) -> None:
    """Bring every source shard into the folder: by the kernel where it is unchanged, else tensor by tensor."""
    settled = []
    with Reader(plan.checkpoint.identity.digests) as reader, ThreadPoolExecutor(1) as settling:
        for shard, name in zip(plan.shards, names, strict=True):
            if stop is not None and stop.is_set():
                return
            target = folder / name
            resumed = target.is_file()
            if not resumed:
                items = carried_items(plan, shard, state, reader)
                if is_unchanged(plan, shard, items):
                    settled.append(copy_file(shard, target, settling, state.record_shard))
                else:
                    write_shard(target, items, reader, state.record_shard)
            progress(ProgressEvent("copying", amount=shard.stat().st_size, resumed=resumed))
        for future in settled:
            future.result()


def carried_items(plan: Plan, shard: Path, state: State, reader: Reader) -> list[Item]:
    """A source shard's tensors under per-expert names, in the order of their bytes; experts that a step reordered are
    made in their new order."""
    spans = sorted((s.begin, n, s) for n, s in plan.spans.items() if s.file == shard)
    places = plan.outline.places if plan.reorders else {}
    items = []
    for _, name, span in spans:
        item = Item.of(name, span)
        if name in places:
            item = replace(item, source=partial(_reordered, state, reader, span, *places[name]))
        items.append(item)
    return items


def is_unchanged(plan: Plan, shard: Path, items: list[Item]) -> bool:
    """Whether these are all tensors of a file of the source, under the names that they have there."""
    spans = {name: span for name, span in plan.checkpoint.spans.items() if span.file == shard}
    return {item.name: item.source for item in items} == spans


def _reordered(
    state: State, reader: Reader, span: TensorSpan, layer: int, expert: int, projection: str
) -> torch.Tensor:
    return permuted_matrix(projection, reader.read(span), state.saved(layer).order(expert))


def write_added(plan: Plan, folder: Path, state: State, packs: list[list[int | None]], names: list[str]) -> None:
    """Write what the model has more than before into shards of its own: of layers, as the state files have it."""
    with Reader(plan.checkpoint.identity.digests) as reader:
        for pack, name in zip(packs, names, strict=True):
            if not (folder / name).is_file():
                items = [item for layer in pack for item in added_items(plan, state, layer)]
                write_shard(folder / name, items, reader, state.record_shard)


def added_items(plan: Plan, state: State, layer: int | None) -> list[Item]:
    """What a layer's block has more than before; without a layer, `Plan.untied`."""
    return plan.untied if layer is None else state.saved(layer).added(plan.outline)


def packs_of_added(plan: Plan) -> list[list[int | None]]:
    """MoE layers whose added tensors go into one shard, at most ``shard_size`` bytes unless one alone is larger.

    None stands for `Plan.untied`.
    """
    sizes: dict[int | None, int] = {layer: plan.added_bytes(layer) for layer in plan.shape.layers}
    sizes[None] = plan.untied_bytes
    packs: list[list[int | None]] = []
    size = 0
    for layer, more in sizes.items():
        if not more:
            continue
        if not packs or size + more > plan.shard_size:
            packs.append([])
            size = 0
        packs[-1].append(layer)
        size += more
    return packs
