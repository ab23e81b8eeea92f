"""Recipes that keep the experts, on calibration text: under ``soft`` their curvature and common order, and routers in
another form under any."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import safe_open

from ..calibration.text import CalibrationText
from ..checkpoint.bytes import Reader
from ..checkpoint.header import TensorSpan, read_header
from ..checkpoint.shard import Item
from ..families import Config
from ..merging.alignment import layer_orders, permuted, permuted_matrix
from ..merging.base import own_base
from ..merging.directions import layer_curvature
from ..merging.experts import Experts, grams
from ..merging.propagation import PropagationState, propagate
from ..merging.record import cosines
from ..progress import FINISHED, ProgressCallback, ProgressEvent, of_layer
from ..recipe import AroundBase, Recipe, Soft
from .added import kronecker_tensors, router_tensors
from .blocks import Blocks, block_tensors
from .finite import check_finite, require_finite_result
from .on_text import Heard, Source, heard_layers, resumed, source_of
from .plan import Plan
from .state import State, Stream
from .walk import (
    carried_items,
    carry_over,
    packs_of_added,
    shard_names,
    stored_base,
    write_added,
)


@dataclass(frozen=True)
class Kept:
    """A MoE layer that is finished."""

    layer: int
    orders: torch.Tensor  # of its experts' neurons, int64 [experts, width]
    tensors: dict[str, torch.Tensor]  # base.gate_proj ..., curvature.usage ..., cosine_router.scale ...
    cosines: torch.Tensor
    record: dict[str, Any]
    stream: Stream


def keep_layers(
    source: Source,
    patched: Config,
    recipe: Recipe,
    text: CalibrationText,
    stream: Stream | None,
    progress: ProgressCallback,
) -> Iterator[Kept]:
    """Take the text, and the base expert where there is one, through the MoE layers.

    Args:
        patched: ``config.json`` of the result.
        stream: where to go on; None: at the bottom.

    Memory: what `heard_layers` and the walk of the base expert say, two thirds of a layer's experts again in the
    layout of the model's class, and outputs, twice ``[tokens, hidden]`` in float32.
    """
    blocks, walk = Blocks(patched, source.family), None if stream is None else stream.walk
    for heard in heard_layers(source, recipe, text, stream, progress):
        layer, mixture = heard.layer, heard.mixture
        with source.named(layer):
            made, walk = _keep(source, recipe, heard, walk, of_layer(progress, layer))
        norm = source.read(source.family.router_norm(layer))
        sparse = recipe.merge.stays_sparse(layer, source.shape.layers)
        routers = router_tensors(recipe, mixture.router, norm, patched, heard.text, text.ids, sparse)
        made = replace(made, tensors=made.tensors | routers)
        require_finite_result(layer, made.tensors, recipe)
        wanted = mixture.output(heard.text.inputs, heard.text.routing)
        with blocks.filled(layer, block_tensors(mixture.experts, mixture.router, made.tensors), recipe.device) as block:
            output = blocks.output(block, heard.text.inputs, text.ids)
            routing = blocks.compared(block, heard.text, text.ids)
        error = float((output - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo().tiny))
        hidden = heard.passed_on(output if recipe.calibration.when == "after" else wanted)
        record = {
            "layer": layer,
            **made.record,
            **routing,
            "errors": [{"stage": recipe.merge.kind, "error": error}],
            "seconds": heard.seconds,
        }
        yield replace(made, record=record, stream=Stream(layer + 1, hidden, walk=walk))
        del heard, mixture, made, wanted, output  # before the next layer is read


def _keep(
    source: Source,
    recipe: Recipe,
    heard: Heard,
    walk: PropagationState | None,
    progress: ProgressCallback,
) -> tuple[Kept, PropagationState | None]:
    """A layer without the record's end and the stream, and the base expert on its way to the next."""
    text, activation, experts = heard.text, heard.mixture.activation, heard.mixture.experts
    count, dtype = experts.count, experts.dtype
    merge = recipe.merge
    curvature = merge.curvature if isinstance(merge, Soft) else None
    align = curvature.align if curvature else "none"
    orders = layer_orders(experts, align, text.inputs, text.routing, activation)
    reorder(experts, orders)
    progress(ProgressEvent("aligned"))
    usage, mass = text.routing.count(count).tolist(), text.routing.mass(count).tolist()
    record: dict[str, Any] = {"usage": usage, "mass": mass, "games": []}
    tensors: dict[str, torch.Tensor] = {}
    sparse = merge.stays_sparse(heard.layer, source.shape.layers)
    if isinstance(merge, AroundBase) and merge.has_base:
        if walk is None:
            walk = PropagationState(
                own_base(merge.base, experts, partial(source.shared, heard.layer), source.shape.width)
            )
        else:
            require_finite_result(heard.layer, stored_base(walk, dtype), recipe)
        position = source.shape.layers.index(heard.layer)
        if not sparse:
            tensors |= stored_base(walk, dtype)
        step = propagate(experts, walk, merge, position, device=recipe.device)
        record["games"], alike, walk = step.record, step.cosines, step.state
    else:
        alike = cosines(grams(experts, experts.zeros(), "expert", recipe.device))
    tensors |= kronecker_tensors(recipe, source.shape, heard.layer, dtype)
    if curvature and curvature.kind == "calibrated" and not sparse:
        assert curvature.rank is not None
        found = layer_curvature(experts, text.inputs, text.routing, activation, curvature.rank, curvature.ridge)
        tensors |= {f"curvature.{name}": tensor.to(dtype) for name, tensor in found.tensors().items()}
        record["explained"] = [round(part.explained, 4) for part in (found.inputs, found.neurons)]
        progress(ProgressEvent("curvature"))
    return Kept(heard.layer, orders, tensors, alike, record, Stream(heard.layer + 1, heard.tapped.rest)), walk


def reorder(experts: Experts, orders: torch.Tensor) -> None:
    """Bring every expert's neurons into its order, in place."""
    for number, order in enumerate(orders):
        experts.set_expert(number, permuted(experts.expert(number), order))


def patch_kept(plan: Plan, folder: Path, state: State, progress: ProgressCallback) -> dict[str, str]:
    """Read the text through all layers, then write all shards; returns the weight map (tensor name to file name)."""
    check_finite(plan, progress)
    keep_checkpoint(plan, state, progress)
    packs = packs_of_added(plan)
    carried = len(plan.shards)
    names = shard_names(carried + len(packs))
    with Reader(plan.checkpoint.identity.digests) as reader:
        merge = plan.recipe.merge
        in_order = not isinstance(merge, Soft) or merge.curvature.align == "none"
        items_of = carried_items if in_order else partial(reordered_items, state, reader)
        carry_over(plan, folder, names[:carried], progress, Event(), state, items_of)
    write_added(plan, folder, state, packs, names[carried:])
    return {tensor: name for name in names for tensor in read_header(folder / name)}


def keep_checkpoint(plan: Plan, state: State, progress: ProgressCallback) -> None:
    """Leave every MoE layer's new tensors in the state folder, and go on there after a kill."""
    assert plan.text is not None
    stream = resumed(plan, state, progress)
    with Reader(plan.checkpoint.identity.digests) as reader:
        source = source_of(plan, reader)
        for made in keep_layers(source, plan.config(), plan.recipe, plan.text, stream, progress):
            usage = torch.tensor(made.record["usage"])
            tensors = {**made.tensors, "new.orders": made.orders, "cosines": made.cosines, "usage": usage}
            state.save_layer(made.layer, tensors, {**made.record, "bytes": plan.layer_bytes(made.layer)})
            state.save_stream(made.stream)
            progress(ProgressEvent(FINISHED, made.layer, amount=plan.layer_bytes(made.layer)))
            del made, tensors  # before the next layer is read


def reordered_items(state: State, reader: Reader, plan: Plan, shard: Path) -> list[Item]:
    """A source shard's tensors, those of experts to be made in their new order."""
    places, items = plan.family.all_experts(plan.shape), []
    for item in carried_items(plan, shard):
        if item.name in places:
            assert isinstance(item.source, TensorSpan)
            item = replace(item, source=partial(_reordered, state, reader, item.source, *places[item.name]))
        items.append(item)
    return items


def _reordered(
    state: State, reader: Reader, span: TensorSpan, layer: int, expert: int, projection: str
) -> torch.Tensor:
    with safe_open(state.layer_file(layer), framework="pt") as file:
        order = file.get_slice("new.orders")[expert]
    return permuted_matrix(projection, reader.read(span), order)
