"""What a run takes, known before it begins: memory and room on the disk."""

from ..calibration.decoder import layer_memory
from ..merging.experts import PROJECTIONS
from .budget import measuring_memory
from .plan import Plan
from .steps import steps_of
from .steps.step import Sizes
from .text_pass import aims_at_model, streams_memory

MARGIN = 64 << 20


def peak_bytes(plan: Plan) -> int:
    """Estimate of the memory held above the libraries' own: a layer's experts, a few more, half of them in float32,
    and chunks; with a recipe that needs text what `text_memory` says."""
    layer = max(map(plan.layer_bytes, plan.shape.layers))
    expert = 4 * sum(rows * columns for rows, columns in map(plan.shape.of, PROJECTIONS))
    return layer + 5 * expert + MARGIN + (text_memory(plan) if plan.recipe.needs_text else 0)


def text_memory(plan: Plan) -> int:
    """Of `peak_bytes`, what calibration text adds: its hidden states, a decoder layer without its experts, and what the
    largest step holds."""
    recipe, shape = plan.recipe, plan.shape
    sizes = Sizes(shape, max(map(plan.layer_bytes, shape.layers)), plan.most_experts, plan.tokens)
    held = streams_memory(recipe, shape) + layer_memory(plan.outline) if plan.reads_text else 0
    held += max(step.memory(sizes) for step in steps_of(recipe))
    return held + (measuring_memory(shape) if plan.spends_budget else 0)


def space_needed(plan: Plan, saves_moments: bool = False) -> int:
    """Bytes on disk at the fullest moment of a run: the result, each layer's base, the state, and a margin."""
    shape, state = plan.shape, 2 * plan.all_added_bytes
    if saves_moments:
        state += 4 * len(shape.layers) * shape.experts * shape.width**2
    if plan.reads_text:  # the stream twice while one replaces the other, and so that of the original
        streams = 4 if aims_at_model(plan.recipe) else 2
        state += 4 * streams * plan.recipe.calibration.tokens * shape.hidden
    if plan.recipe.needs_text and plan.recipe.merge.rewrites:  # all new layers
        state += plan.routed_bytes_out + plan.shared_bytes
    return plan.bytes_out + state + MARGIN
