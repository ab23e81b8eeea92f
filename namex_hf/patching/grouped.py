"""``merge: grouped`` out of core: every layer's experts are clustered, each group becomes one, the result is stock."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.bytes import Reader
from ..checkpoint.header import TensorSpan, read_header
from ..checkpoint.shard import Item, write_shard
from ..errors import FamilyError
from ..merging.experts import Expert
from ..merging.groups import MergedLayer, merge_layer
from ..progress import FINISHED, ProgressCallback, ProgressEvent
from .added import cosine_shapes, router_tensors
from .finite import check_finite, is_finite, require_finite_result
from .layer import moe_layer, named, read_experts
from .plan import LAYER, Plan, constant_items
from .state import State
from .walk import METADATA, shard_names

logger = logging.getLogger(__name__)
NUMBERS = re.compile(r"(\d+)")


@dataclass
class LayerMaker:
    """Merges layers on demand, the latest kept: the writer asks for one tensor after the other.

    Memory: one layer's experts, and the merged one that is being written.
    """

    plan: Plan
    reader: Reader
    state: State
    progress: ProgressCallback
    layer: int | None = None
    merged: MergedLayer | None = None
    routers: dict[str, torch.Tensor] = field(default_factory=dict)  # the layer's router in another form
    room: Expert | None = None  # the latest layer's experts
    latest: tuple[int, int] | None = None  # layer and index of the expert that was made last
    made: Expert | None = None

    def get(self, layer: int) -> MergedLayer:
        if self.layer != layer or self.merged is None:
            self.merged = None  # the last one goes before the next comes
            self.merged, self.layer = self._merge(layer), layer
        return self.merged

    def router(self, layer: int) -> torch.Tensor:
        return self.get(layer).router

    def router_part(self, layer: int, name: str) -> torch.Tensor:
        self.get(layer)
        return self.routers[name]

    def expert(self, layer: int, expert: int, projection: str) -> torch.Tensor:
        if self.made is None or self.latest != (layer, expert):
            self.made, self.latest = self.get(layer).expert(expert), (layer, expert)
            named = {f"expert {expert} {name}": tensor for name, tensor in self.made.items()}
            require_finite_result(layer, named, self.plan.recipe)
        return self.made[projection]

    def items(self, layer: int) -> list[Item]:
        """Router and experts of a layer, made when their turn comes."""
        plan = self.plan
        router = plan.spans[name := plan.family.router(layer)]
        items = [Item(name, router.dtype, (plan.kept, plan.shape.hidden), partial(self.router, layer))]
        for name, place in plan.family.experts(layer, plan.kept).items():
            span = plan.spans[name]
            items.append(Item(name, span.dtype, span.shape, partial(self.expert, layer, *place)))
        for name, shape in cosine_shapes(plan.recipe, plan.kept, plan.shape.hidden).items():
            added = plan.family.added(layer, *name.split("."))
            items.append(Item(added, router.dtype, shape, partial(self.router_part, layer, name)))
        return items

    def _merge(self, layer: int) -> MergedLayer:
        plan, start = self.plan, time.perf_counter()
        router = self.reader.read(plan.spans[plan.family.router(layer)])
        norm = self.reader.read(plan.spans[plan.family.router_norm(layer)])
        self.room = experts = read_experts(plan, self.reader, layer, self.room)
        later = [other for other in plan.shape.layers if other > layer]
        if later:
            self.reader.expect(plan.expert_spans(later[0]))
        with named(plan, layer):
            before = moe_layer(plan.checkpoint.config, plan.shape, experts, router)
            merged = merge_layer(before, norm, plan.grouped, plan.recipe.seed, plan.recipe.device)
        self.routers = router_tensors(plan.recipe, merged.router, norm, plan.config())
        require_finite_result(layer, {"router": merged.router, **self.routers}, plan.recipe)
        record = {
            "layer": layer,
            **merged.record,
            "seconds": round(time.perf_counter() - start, 4),
            "bytes": plan.layer_bytes(layer),
        }
        self.state.save_layer(layer, {"cosines": merged.cosines}, record)
        self.progress(ProgressEvent(FINISHED, layer, amount=plan.layer_bytes(layer)))
        return merged


def patch_grouped(plan: Plan, folder: Path, state: State, progress: ProgressCallback) -> dict[str, str]:
    """Write all shards; returns the weight map (tensor name to file name)."""
    check_finite(plan, progress)
    with Reader(plan.checkpoint.identity.digests) as reader:
        return write_packs(plan, folder, reader, LayerMaker(plan, reader, state, progress).items, state, progress)


def write_packs(
    plan: Plan,
    folder: Path,
    reader: Reader,
    made: Callable[[int], list[Item]],
    state: State,
    progress: ProgressCallback,
) -> dict[str, str]:
    """Write the shards of the result; those that a killed run left are kept."""
    packs = pack(items_of(plan, made, reader), plan.shard_size)
    names = shard_names(len(packs))
    for items, name in zip(packs, names, strict=True):
        target = folder / name
        layers = sorted({int(m[1]) for item in items if (m := LAYER.match(item.name))} & {*plan.shape.layers})
        if target.is_file() and all(state.layer_file(layer).is_file() for layer in layers):
            logger.info("%s is there; continues after it", name)
            for layer in layers:
                progress(ProgressEvent(FINISHED, layer, amount=plan.layer_bytes(layer), resumed=True))
        else:
            write_shard(target, items, reader, METADATA, state.record_shard)
    return {tensor: name for name in names for tensor in read_header(folder / name)}


def items_of(plan: Plan, made: Callable[[int], list[Item]], reader: Reader) -> list[Item]:
    """All tensors of the result in their natural order, layer by layer.

    Args:
        made: router and experts of a MoE layer, and what else of it takes the place of a tensor of its name.
    """
    gone = {*plan.family.all_experts(plan.shape), *map(plan.family.router, plan.shape.layers)}
    by_name = {name: Item.of(name, span) for name, span in plan.spans.items() if name not in gone}
    for layer in plan.shape.layers:
        by_name |= {item.name: item for item in made(layer)}
    items = [*by_name.values(), *plan.untied]
    if plan.export_as:
        items = reexpressed(plan, items, reader)
    return sorted(items, key=lambda item: natural(item.name))


def reexpressed(plan: Plan, items: list[Item], reader: Reader) -> list[Item]:
    """The same tensors in the form of another family."""
    form = plan.family.as_qwen2_moe
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


def pack(items: list[Item], shard_size: int) -> list[list[Item]]:
    """Fill shards up to a size. A layer is never split, so that it is merged once, even after a kill."""
    units: dict[str, list[Item]] = {}
    for item in items:
        match = LAYER.match(item.name)
        units.setdefault(match[0] if match else item.name, []).append(item)
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
