"""``merge: narrow``: every expert and the router stay, and of each expert the neurons that matter most."""

from functools import partial

import torch

from ...merging.layer_fit import fit_memory
from ...merging.narrow import Narrowing
from ...recipe import Narrow
from ..finite import require_finite_result
from .step import LayerWork, Sizes, Step, Tensors


class NarrowExperts(Step):
    """Takes the source's experts: they are freed before a fit."""

    def __call__(self, work: LayerWork) -> None:
        assert isinstance(work.merge, Narrow)
        source, layer = work.source, work.layer
        shared = partial(source.shared, layer)
        narrowing = Narrowing(
            work.mixture,
            work.required_text,
            work.merge,
            work.recipe.seed,
            work.recipe.calibration.error_weights,
            shared=shared,
            progress=work.progress,
        )
        work.mixture = work.mixture.without_experts()
        with source.named(layer):
            narrow, work.output = narrowing.run()
        for name, matrices in narrow.experts.items():
            numbered = {f"expert {number} {name}": matrix for number, matrix in enumerate(matrices)}
            require_finite_result(layer, numbered, work.recipe)
        work.router, work.bias, work.experts = narrow.router, narrow.bias, narrow.experts
        work.shared = padded_shared(work, narrowing.refitted, narrowing.merge.width)
        require_finite_result(layer, {"router": work.router, **work.shared}, work.recipe)
        work.target, work.shared_delta = narrowing.target, narrowing.shared_output_delta
        work.statistics = {"usage": torch.tensor(narrowing.record["usage"]), "neurons": narrowing.stay.to(torch.int32)}
        work.record |= narrowing.record

    def memory(self, sizes: Sizes) -> int:
        """The narrower layer, one expert and its neurons on its tokens, its moments, or what a fit holds."""
        assert isinstance(self.recipe.merge, Narrow)
        shape, width = sizes.shape, self.recipe.merge.width
        assert width is not None
        held = cut_memory(sizes, shape.experts)
        if self.recipe.merge.fit.kind == "layer":
            sizes_of_fit = (shape.hidden, width, shape.shared_width, shape.experts, shape.top_k, sizes.tokens)
            held = max(held, fit_memory(*sizes_of_fit))
        return sizes.layer * width // shape.width + held


def cut_memory(sizes: Sizes, experts: int) -> int:
    """Bytes of one expert, its neurons on its tokens and their moments. Args: experts, of a layer that is cut."""
    shape = sizes.shape
    tokens = 4 * sizes.tokens * min(shape.top_k, experts) // experts  # one expert may receive four times its share
    return 4 * tokens * (3 * shape.width + shape.hidden) + 4 * 8 * shape.width**2 + 12 * shape.hidden * shape.width


def padded_shared(work: LayerWork, refitted: Tensors, width: int | None) -> Tensors:
    """The parts of a layer's shared expert that change, under another width of the routed experts.

    Where the family states its width as a number of theirs, neurons of zeros are added: the same function.

    Args:
        refitted: the shared expert after a fit, or nothing.
    """
    source = work.source
    more = source.outline.padded_width(width) - source.shape.shared_width if width else 0
    if not more:
        return refitted
    parts = refitted or dict(source.shared(work.layer))
    widths = {"gate_proj": (0, 0, 0, more), "up_proj": (0, 0, 0, more), "down_proj": (0, more)}
    return {name: torch.nn.functional.pad(t, widths[name]) if name in widths else t for name, t in parts.items()}


STEP = NarrowExperts
