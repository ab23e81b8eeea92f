"""A layer's tensors out of a planned checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.activations import ACT2FN

from ..checkpoint.bytes import Reader
from ..errors import CheckpointError
from ..families import PROJECTIONS, Config, MoeShape
from ..merging.experts import Expert, ExpertWeights, NotFiniteError
from ..merging.moe_layer import MoELayer
from .plan import Plan


def read_experts(plan: Plan, reader: Reader, layer: int, room: Expert | None = None) -> Expert:
    """The routed experts of a layer, stacked, in their own dtype. Every byte is read once.

    Args:
        room: an earlier layer's tensors that nobody needs any more; they are filled again where they fit.
    """
    stacked, places = {}, []
    for projection in PROJECTIONS:
        spans = [plan.spans[plan.family.expert(layer, e, projection)] for e in range(plan.shape.experts)]
        shape, dtype = (len(spans), *spans[0].shape), spans[0].dtype
        fits = room is not None and room[projection].dtype == dtype
        stacked[projection] = room[projection] if room and fits else torch.empty(shape, dtype=dtype)
        places += list(zip(spans, stacked[projection], strict=True))
    for span, target in sorted(places, key=lambda place: (place[0].file, place[0].begin)):
        reader.read_into(span, target)
    return ExpertWeights.of(stacked.__getitem__)


def read_shared(plan: Plan, reader: Reader, layer: int) -> Expert:
    """The shared expert of a layer."""
    return ExpertWeights.of(lambda name: reader.read(plan.spans[plan.family.shared(layer, name)]))


def moe_layer(config: Config, shape: MoeShape, experts: Expert, router: torch.Tensor) -> MoELayer:
    """A layer of the model with this ``config.json``."""
    activation = ACT2FN[config.get("hidden_act", "silu")]
    return MoELayer(experts, router, shape.top_k, shape.renormalises, activation)


@contextmanager
def named(plan: Plan, layer: int) -> Iterator[None]:
    """Give a complaint about an expert the name of its tensor.

    Raises:
        CheckpointError: in place of `NotFiniteError`.
    """
    try:
        yield
    except NotFiniteError as error:
        tensor = plan.family.expert(layer, error.expert, error.projection)
        file = plan.spans[tensor].file.name
        raise CheckpointError(f"tensor {tensor} in {file} holds NaN or infinite values") from error
