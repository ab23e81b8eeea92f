"""The layers of a checkpoint, and a look at all that is carried over."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..checkpoint.bytes import Reader
from ..checkpoint.header import TensorSpan
from ..errors import CheckpointError
from ..merging.experts import PROJECTIONS, Expert, ExpertWeights, NotFiniteError
from ..progress import ProgressCallback, ProgressEvent
from .finite import is_finite
from .plan import Plan
from .sources import LayerSource


def checkpoint_source(plan: Plan, reader: Reader) -> LayerSource:
    """The checkpoint of a plan. Every byte of an expert is read once.

    Without calibration text layers are read in order, each into the memory of the one before it, while the next one is
    fetched: nothing may be kept of a layer's experts.
    """
    room: Expert | None = None

    def experts(layer: int) -> Expert:
        nonlocal room
        if plan.recipe.needs_text:
            return read_experts(plan, reader, layer)
        room = read_experts(plan, reader, layer, room)
        if later := [other for other in plan.shape.layers if other > layer]:
            reader.expect(plan.expert_spans(later[0]))
        return room

    @contextmanager
    def named(layer: int) -> Iterator[None]:
        try:
            yield
        except NotFiniteError as error:
            tensor = plan.outline.expert(layer, error.expert, error.projection)
            file = plan.spans[tensor].file.name
            raise CheckpointError(f"tensor {tensor} in {file} holds NaN or infinite values") from error

    def read(name: str) -> torch.Tensor:
        return reader.read(plan.spans[plan.outline.stored(name, plan.spans)])

    def dtype(layer: int) -> torch.dtype:
        return plan.expert_spans(layer)[0].dtype

    return LayerSource(plan.checkpoint.config, plan.outline, read, dtype, experts, named)


def read_experts(plan: Plan, reader: Reader, layer: int, room: Expert | None = None) -> Expert:
    """The routed experts of a layer, stacked, in their own dtype.

    Args:
        room: an earlier layer's tensors that nobody needs any more; they are filled again where they fit.
    """
    stacked, places = {}, []
    for projection in PROJECTIONS:
        spans = [plan.spans[plan.outline.expert(layer, e, projection)] for e in range(plan.shape.experts)]
        shape, dtype = (len(spans), *spans[0].shape), spans[0].dtype
        fits = room is not None and room[projection].dtype == dtype
        stacked[projection] = room[projection] if room and fits else torch.empty(shape, dtype=dtype)
        places += list(zip(spans, stacked[projection], strict=True))
    for span, target in sorted(places, key=lambda place: (place[0].file, place[0].begin)):
        reader.read_into(span, target)
    return ExpertWeights.of(stacked.__getitem__)


def check_finite(plan: Plan, progress: ProgressCallback) -> None:
    """Read every floating tensor that is no routed expert's (those are checked where they are merged).

    Memory: one tensor at a time.

    Raises:
        CheckpointError: naming the tensor.
    """
    experts = plan.outline.places
    merge = plan.recipe.merge
    merged = merge.has_base or plan.recipe.needs_text or merge.rewrites
    with Reader(plan.checkpoint.identity.digests) as reader:
        for name, span in plan.spans.items():
            if name in experts and merged:
                continue
            if span.dtype.is_floating_point and span.dtype.itemsize > 1:
                require_finite(name, span, reader.read(span))
            progress(ProgressEvent("checking", amount=span.size))


def require_finite(name: str, span: TensorSpan, tensor: torch.Tensor) -> None:
    if not is_finite(tensor):
        raise CheckpointError(f"tensor {name} in {span.file.name} holds NaN or infinite values")
