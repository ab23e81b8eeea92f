"""Results of the pipeline into the shards of a model folder."""

import logging
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.bytes import Reader
from ..checkpoint.header import read_header
from ..checkpoint.shard import Item, shard_names
from ..merging.experts import Expert
from ..progress import FINISHED, ProgressCallback, ProgressEvent, no_progress
from .carry import added_items, carried_beside, carry_over, packs_of_added, write_added
from .checkpoint_source import check_finite, checkpoint_source
from .finite import require_finite_result
from .gradients import gradients_of
from .moments import MomentsFolder
from .packs import write_packs
from .pipeline import Passage, Pipeline
from .plan import Plan
from .result import LayerResult
from .scores import Scores
from .state import State

logger = logging.getLogger(__name__)


def write_checkpoint(
    plan: Plan,
    folder: Path,
    state: State,
    progress: ProgressCallback,
    scores: Scores | None = None,
    moments: MomentsFolder | None = None,
    shared: Passage | None = None,
) -> Generator[int, None, dict[str, str]]:
    """Run the pipeline over a checkpoint and write all shards; returns the weight map (tensor name to file name).

    A killed run goes on where its state is. Where layers depend on each other, each is yielded before it is begun.

    Args:
        scores: of experts, by layer, in the place of the plan's text.
        moments: of neurons, likewise where they are complete; else they are saved.
        shared: as of `Pipeline`.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
        RecipeError: the result would.
    """
    with Reader(plan.checkpoint.identity.digests) as reader:
        source = checkpoint_source(plan, reader)
        pipeline = Pipeline(
            source,
            plan.recipe,
            plan.config(),
            plan.text,
            scores,
            moments,
            gradients_of(plan),
            counts=plan.counts,
            progress=progress,
            shared=shared,
        )
        write = _write_smaller if plan.recipe.merge.rewrites else _write_carried
        names = yield from write(plan, folder, pipeline, reader, state, progress)
    return {tensor: name for name in names for tensor in read_header(folder / name)}


def _write_carried(
    plan: Plan, folder: Path, pipeline: Pipeline, reader: Reader, state: State, progress: ProgressCallback
) -> Generator[int, None, list[str]]:
    """The source's shards, and others with what the layers have more."""
    packs, count = packs_of_added(plan), len(plan.shards)
    names = shard_names(count + len(packs))
    carried = (plan, folder, names[:count], state, progress)
    with carried_beside(*carried) if plan.text is None else nullcontext():
        check_finite(plan, progress)
        if pipeline.steps:
            yield from save(plan, pipeline, state, progress)
    if plan.text is not None:  # now the processor is free, and it is known in which order experts' neurons are
        carry_over(*carried)
    write_added(plan, folder, state, packs, names[count:])
    return names


def _write_smaller(
    plan: Plan, folder: Path, pipeline: Pipeline, reader: Reader, state: State, progress: ProgressCallback
) -> Generator[int, None, list[str]]:
    """Shards with other experts: with text all layers come first, as each depends on those below it."""
    check_finite(plan, progress)
    if not plan.recipe.needs_text:
        layers = LazyLayers(plan, pipeline, state, progress)
        return write_packs(plan, folder, reader, layers.items, state, progress)
    yield from save(plan, pipeline, state, progress)
    return write_packs(plan, folder, reader, partial(_saved_items, plan, state), state, no_progress)


def save(plan: Plan, pipeline: Pipeline, state: State, progress: ProgressCallback) -> Iterator[int]:
    """Leave every layer's result in the state folder, and go on there after a kill."""
    arrived, results = state.arrived(), None
    if arrived:
        logger.info("continues at layer %d", arrived)
    for layer in plan.shape.layers:
        finished = ProgressEvent(FINISHED, layer, amount=plan.layer_bytes(layer), resumed=layer < arrived)
        if not finished.resumed:
            yield layer
            results = results or pipeline.run(state.load())  # not before: others may have the text still below
            result = next(results)
            state.save_layer(result, finished.amount)
            state.save(result.state)
            del result  # before the next layer is read
        progress(finished)


def _saved_items(plan: Plan, state: State, layer: int) -> list[Item]:
    replaced = state.saved(layer).replaced(plan.outline, plan.experts_of(layer))
    return replaced + added_items(plan, state, layer)


@dataclass
class LazyLayers:
    """Layers that do not depend on each other, made on demand: the writer asks for one tensor after the other.

    Memory: one layer's experts, and the merged one that is being written.
    """

    plan: Plan
    pipeline: Pipeline
    state: State
    progress: ProgressCallback
    latest: LayerResult | None = None
    expert: tuple[int, int, Expert] | None = None  # layer, number and matrices of the latest one

    def items(self, layer: int) -> list[Item]:
        """Router and experts of a layer, and what its block has more."""
        plan, outline = self.plan, self.plan.outline
        router = plan.span(outline.router(layer))
        rows = (plan.experts, plan.shape.hidden)
        name = outline.file(outline.router(layer))
        items = [Item(name, router.dtype, rows, lambda: self._tensor(self._result(layer).router))]
        if bias := outline.bias(layer):
            span = plan.span(bias)
            entries = (*span.shape[:-1], plan.experts)
            items.append(Item(outline.file(bias), span.dtype, entries, lambda: self._tensor(self._result(layer).bias)))
        for name, (number, projection) in outline.experts(layer, plan.experts).items():
            span = plan.spans[name]
            items.append(Item(name, span.dtype, span.shape, partial(self._expert, layer, number, projection)))
        for name, (shape, dtype) in plan.added(layer).items():
            added = outline.added(layer, *name.split(".", 1))
            items.append(Item(added, dtype, shape, partial(self._added, layer, name)))
        return items

    def _result(self, layer: int) -> LayerResult:
        if self.latest is None or self.latest.layer != layer:
            self.latest = None  # the last one goes before the next comes
            self.latest = self.pipeline.layer(layer, Passage())
            self.state.save_layer(self.latest, size := self.plan.layer_bytes(layer))
            self.progress(ProgressEvent(FINISHED, layer, amount=size))
        return self.latest

    def _tensor(self, tensor: torch.Tensor | None) -> torch.Tensor:
        assert tensor is not None
        return tensor

    def _added(self, layer: int, name: str) -> torch.Tensor:
        return self._result(layer).added[name]

    def _expert(self, layer: int, number: int, projection: str) -> torch.Tensor:
        if self.expert is None or self.expert[:2] != (layer, number):
            experts = self._result(layer).experts
            assert experts is not None
            self.expert = None
            self.expert = (layer, number, experts.expert(number))
            named = {f"expert {number} {name}": tensor for name, tensor in self.expert[2].items()}
            require_finite_result(layer, named, self.plan.recipe)
        return self.expert[2][projection]
