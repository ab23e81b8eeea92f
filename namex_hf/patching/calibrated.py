"""``merge: grouped`` on calibration text: layer by layer, each on what the layers below it really produce."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibration.text import CalibrationText
from ..checkpoint.bytes import Reader
from ..checkpoint.header import TensorSpan, read_header
from ..checkpoint.shard import Item
from ..families import Config
from ..merging.calibrated import Shrinking
from ..merging.moe_layer import MoELayer
from ..progress import FINISHED, ProgressCallback, ProgressEvent, no_progress, of_layer
from ..recipe import Grouped, Recipe
from .added import router_tensors
from .blocks import Blocks, block_tensors
from .budget import spend
from .finite import check_finite, require_finite_result
from .grouped import write_packs
from .on_text import Source, heard_layers, resumed, source_of
from .plan import Plan
from .state import State, Stream
from .walk import added_items


@dataclass(frozen=True)
class Made:
    """A MoE layer that is finished."""

    layer: int
    mixture: MoELayer
    cosines: torch.Tensor
    record: dict[str, Any]
    stream: Stream
    routers: dict[str, torch.Tensor]  # cosine_router.scale ..., none where routing is linear
    shared: dict[str, torch.Tensor]  # by `Family.shared_parts`, none where it stays as it is


def shrink_layers(
    source: Source,
    patched: Config,
    recipe: Recipe,
    text: CalibrationText,
    stream: Stream | None,
    progress: ProgressCallback,
    counts: tuple[int, ...] | None = None,
) -> Iterator[Made]:
    """Make the MoE layers smaller, one after the other.

    Args:
        patched: ``config.json`` of the result.
        stream: where to go on; None: at the bottom.
        counts: of experts that each MoE layer keeps; None: all keep the recipe's number.

    Memory: what `heard_layers` says, one layer's experts again in the number that is left, and outputs, twice
    ``[tokens, hidden]`` in float32.
    """
    blocks = Blocks(patched, source.family) if recipe.routing.kind != "linear" else None
    merge = recipe.merge
    assert isinstance(merge, Grouped)
    for heard in heard_layers(source, recipe, text, stream, progress):
        layer = heard.layer
        if counts is not None:
            merge = replace(merge, experts=counts[source.shape.layers.index(layer)])
        shared = partial(source.shared, layer)
        shrinking = Shrinking(
            heard.mixture, heard.text, merge, recipe.seed, shared=shared, progress=of_layer(progress, layer)
        )
        heard = heard.without_experts()
        with source.named(layer):
            smaller, output = shrinking.run()
        for name, some in smaller.experts.items():
            require_finite_result(layer, {f"expert {number} {name}": one for number, one in enumerate(some)}, recipe)
        require_finite_result(layer, {"router": smaller.router, **shrinking.refitted}, recipe)
        routers: dict[str, torch.Tensor] = {}
        if blocks is not None:
            norm = source.read(source.family.router_norm(layer))
            routers = router_tensors(recipe, smaller.router, norm, patched, heard.text, text.ids)
            with blocks.filled(layer, block_tensors(smaller.experts, smaller.router, routers), recipe.device) as block:
                output = blocks.output(block, heard.text.inputs, text.ids)
                if shrinking.shared_output_delta is not None:
                    output += shrinking.shared_output_delta
                shrinking.record |= blocks.compared(block, heard.text, text.ids)
        hidden = heard.passed_on(output if recipe.calibration.when == "after" else shrinking.target)
        record = {"layer": layer, **shrinking.record, "seconds": heard.seconds}
        stream = Stream(layer + 1, hidden, heard.original)
        yield Made(layer, smaller, shrinking.cosines, record, stream, routers, shrinking.refitted)
        del heard, shrinking, smaller, output  # before the next layer is read


def patch_calibrated(plan: Plan, folder: Path, state: State, progress: ProgressCallback) -> dict[str, str]:
    """Make all layers, then write all shards; returns the weight map (tensor name to file name)."""
    check_finite(plan, progress)
    shrink_checkpoint(plan, state, progress)
    with Reader(plan.checkpoint.identity.digests) as reader:
        return write_packs(plan, folder, reader, partial(new_items, plan, state), state, no_progress)


def with_counts(plan: Plan, state: State, progress: ProgressCallback) -> Plan:
    """The plan with its budget dealt out by `spend`, as it was before a kill."""
    record = state.load_budget()
    if record is None:
        assert plan.text is not None
        check_finite(plan, no_progress)
        with Reader(plan.checkpoint.identity.digests) as reader:
            record = spend(source_of(plan, reader), plan.recipe, plan.text, progress)
        state.save_budget(record)
    return replace(plan, counts=tuple(layer["experts"] for layer in record))


def shrink_checkpoint(plan: Plan, state: State, progress: ProgressCallback) -> None:
    """Leave every MoE layer's new tensors in the state folder, and go on there after a kill."""
    assert plan.text is not None
    stream = resumed(plan, state, progress)
    with Reader(plan.checkpoint.identity.digests) as reader:
        source = source_of(plan, reader)
        for made in shrink_layers(source, plan.config(), plan.recipe, plan.text, stream, progress, plan.counts):
            usage = torch.tensor(made.record["usage"])
            tensors = {"new.router": made.mixture.router, "cosines": made.cosines, "usage": usage, **made.routers}
            for name, matrices in made.mixture.experts.items():
                tensors |= {f"new.{number}.{name}": matrix for number, matrix in enumerate(matrices)}
            tensors |= {f"new.shared.{part}": tensor for part, tensor in made.shared.items()}
            state.save_layer(made.layer, tensors, {**made.record, "bytes": plan.layer_bytes(made.layer)})
            state.save_stream(made.stream)
            progress(ProgressEvent(FINISHED, made.layer, amount=plan.layer_bytes(made.layer)))
            del made, tensors  # before the next layer is read


def new_items(plan: Plan, state: State, layer: int) -> list[Item]:
    """A layer's new tensors, as spans of the file that `shrink_checkpoint` left, and `added_items`."""
    spans: dict[str, TensorSpan] = read_header(state.layer_file(layer))
    items = [Item.of(plan.family.router(layer), spans["new.router"])]
    for name, (expert, projection) in plan.family.experts(layer, plan.kept_of(layer)).items():
        items.append(Item.of(name, spans[f"new.{expert}.{projection}"]))
    for part, name in plan.family.shared_parts(layer).items():
        if (span := spans.get(f"new.shared.{part}")) is not None:
            items.append(Item.of(name, span))
    return items + added_items(plan, state, layer)
