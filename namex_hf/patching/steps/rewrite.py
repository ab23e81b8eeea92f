"""What the steps share that give a layer other experts, by what the text shows."""

from functools import partial
from typing import Any

import torch

from ...merging.rewriting import Rewriting
from ..finite import require_finite_result
from .step import LayerWork, Sizes, Step, Tensors


class Rewrite(Step):
    """Takes the source's experts: a fit of the whole layer frees them."""

    kind: type[Rewriting[Any]]

    def __call__(self, work: LayerWork) -> None:
        source, layer, recipe = work.source, work.layer, work.recipe
        rewriting = self.kind(
            work.mixture,
            work.required_text,
            work.merge,
            recipe.seed,
            recipe.calibration.error_weights,
            shared=partial(source.shared, layer),
            progress=work.progress,
            **self.more(work),
        )
        work.mixture = work.mixture.without_experts()
        with source.named(layer):
            smaller, work.output = rewriting.run()
        for name, matrices in smaller.experts.items():
            numbered = {f"expert {number} {name}": matrix for number, matrix in enumerate(matrices)}
            require_finite_result(layer, numbered, recipe)
        work.router, work.bias, work.experts = smaller.router, smaller.bias, smaller.experts
        work.shared = padded_shared(work, rewriting.refitted, rewriting.merge.width)
        require_finite_result(layer, {"router": work.router, **work.shared}, recipe)
        work.target, work.shared_delta = rewriting.target, rewriting.shared_output_delta
        work.statistics = {"usage": torch.tensor(rewriting.record["usage"]), **self.statistics(rewriting)}
        if rewriting.stay is not None:
            work.statistics["neurons"] = rewriting.stay.to(torch.int32)
        work.record |= rewriting.record

    def more(self, work: LayerWork) -> dict[str, Any]:
        """Arguments of `kind` beside those of every `Rewriting`."""
        return {}

    def statistics(self, rewriting: Any) -> Tensors:
        """Statistics beside the tokens of each expert and the neurons that stay."""
        return {}


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
