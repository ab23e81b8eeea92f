"""Recipes that keep the experts, out of core: every shard is carried over, and each layer's base, if any, is added."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch

from ..checkpoint.bytes import Reader, copy_file
from ..checkpoint.header import read_header
from ..checkpoint.shard import Item, write_shard
from ..merging.base import own_base
from ..merging.propagation import PropagationState, propagate
from ..progress import FINISHED, ProgressCallback, ProgressEvent
from ..recipe import AroundBase
from .added import KINDS, kronecker_tensors, router_tensors
from .finite import check_finite, require_finite_result
from .layer import named, read_experts, read_shared
from .plan import Plan
from .state import State

logger = logging.getLogger(__name__)
METADATA = {"format": "pt"}


def carried_items(plan: Plan, shard: Path) -> list[Item]:
    """A source shard's tensors under per-expert names, in the order of their bytes."""
    spans = sorted((s.begin, n, s) for n, s in plan.spans.items() if s.file == shard)
    return [Item.of(name, span) for _, name, span in spans]


def is_unchanged(plan: Plan, shard: Path, items: list[Item]) -> bool:
    """Whether these are all tensors of a file of the source, under the names that they have there."""
    spans = {name: span for name, span in plan.checkpoint.spans.items() if span.file == shard}
    return {item.name: item.source for item in items} == spans


def carry_over(
    plan: Plan,
    folder: Path,
    names: list[str],
    progress: ProgressCallback,
    stop: Event,
    state: State,
    items_of: Callable[[Plan, Path], list[Item]] = carried_items,
) -> None:
    """Bring every source shard into the folder: by the kernel where it is unchanged, else tensor by tensor."""
    settled = []
    with Reader(plan.checkpoint.identity.digests) as reader, ThreadPoolExecutor(1) as settling:
        for shard, name in zip(plan.shards, names, strict=True):
            if stop.is_set():
                return
            target = folder / name
            resumed = target.is_file()
            if not resumed:
                items = items_of(plan, shard)
                if is_unchanged(plan, shard, items):
                    settled.append(copy_file(shard, target, settling, state.record_shard))
                else:
                    write_shard(target, items, reader, METADATA, state.record_shard)
            progress(ProgressEvent("copying", amount=shard.stat().st_size, resumed=resumed))
        for future in settled:
            future.result()


def walk_through(plan: Plan, state: State, progress: ProgressCallback) -> None:
    """Take the base expert, where there is one, through all MoE layers and leave what each adds in the state folder.

    Memory: one layer's experts in their own dtype, the base in float32 three times, momentum buffers, chunks.

    Raises:
        CheckpointError: an expert holds NaN or infinity.
    """
    recipe, layers, config = plan.recipe, plan.shape.layers, plan.config()
    merge = recipe.merge
    position, walk = state.load_walk()
    if 0 < position < len(layers):
        logger.info("continues at layer %d", layers[position])
    experts = None
    with Reader(plan.checkpoint.identity.digests) as reader:
        for done in layers[:position]:
            progress(ProgressEvent(FINISHED, done, amount=plan.layer_bytes(done), resumed=True))
        for place, layer in list(enumerate(layers))[position:]:
            start = time.perf_counter()
            dtype = plan.expert_spans(layer)[0].dtype
            router, norm = (reader.read(plan.spans[n(layer)]) for n in (plan.family.router, plan.family.router_norm))
            stored = kronecker_tensors(recipe, plan.shape, layer, dtype) | router_tensors(recipe, router, norm, config)
            record: dict[str, Any] = {"layer": layer, "games": []}
            if isinstance(merge, AroundBase) and merge.has_base:
                experts = read_experts(plan, reader, layer, experts)
                if place + 1 < len(layers):
                    reader.expect(plan.expert_spans(layers[place + 1]))
                with named(plan, layer):
                    if walk is None:
                        shared = partial(read_shared, plan, reader, layer)
                        walk = PropagationState(own_base(merge.base, experts, shared, plan.shape.width))
                    else:
                        require_finite_result(layer, stored_base(walk, dtype), recipe)
                    if not merge.stays_sparse(layer, layers):
                        stored |= stored_base(walk, dtype)
                    step = propagate(experts, walk, merge, place, device=recipe.device)
                stored["cosines"], record["games"], walk = step.cosines, step.record, step.state
            require_finite_result(layer, stored, recipe)
            record |= {"seconds": round(time.perf_counter() - start, 4), "bytes": plan.layer_bytes(layer)}
            state.save_layer(layer, stored, record)
            state.save_walk(place + 1, walk)
            progress(ProgressEvent(FINISHED, layer, amount=plan.layer_bytes(layer)))


def stored_base(walk: PropagationState, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The base expert of a layer, as the result holds it."""
    return {f"base.{name}": matrix.to(dtype) for name, matrix in walk.base.items()}


def write_added(plan: Plan, folder: Path, state: State, packs: list[list[int | None]], names: list[str]) -> None:
    """Write what the model has more than before into shards of its own: of layers, as the state files have it."""
    with Reader(plan.checkpoint.identity.digests) as reader:
        for pack, name in zip(packs, names, strict=True):
            if not (folder / name).is_file():
                items = [item for layer in pack for item in added_items(plan, state, layer)]
                write_shard(folder / name, items, reader, METADATA, state.record_shard)


def added_items(plan: Plan, state: State, layer: int | None) -> list[Item]:
    """What a layer's block has more than before, as spans of its state file; without a layer, `Plan.untied`."""
    if layer is None:
        return plan.untied
    items = []
    for name, span in read_header(state.layer_file(layer)).items():
        kind, _, part = name.partition(".")
        if kind in KINDS:
            items.append(Item.of(plan.family.added(layer, kind, part), span))
    return items


def patch_walking(plan: Plan, folder: Path, state: State, progress: ProgressCallback) -> dict[str, str]:
    """Write all shards; returns the weight map (tensor name to file name).

    The copy runs beside the arithmetic: one waits for the disk, the other for the processor.
    """
    packs = packs_of_added(plan)
    names = shard_names(len(plan.shards) + len(packs))
    carried = len(plan.shards)
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        copying: Future[None] = pool.submit(carry_over, plan, folder, names[:carried], progress, stop, state)
        try:
            check_finite(plan, progress)
            if plan.all_added_bytes:
                walk_through(plan, state, progress)
        except BaseException:
            stop.set()  # bad input or an interrupt: no further shard is begun
            raise
        copying.result()
    write_added(plan, folder, state, packs, names[carried:])
    return {tensor: name for name in names for tensor in read_header(folder / name)}


def shard_names(count: int) -> list[str]:
    """transformers' names: one file, or numbered ones that go with an index."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


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
