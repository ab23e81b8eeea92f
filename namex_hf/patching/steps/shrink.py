"""``merge: grouped`` on calibration text: groups, weights, rows and downs follow what the layer does with the text."""

from functools import partial

import torch

from ...merging.calibrated import Shrinking
from ...merging.curvature import sums_memory
from ...merging.layer_fit import fit_memory
from ...merging.router_fit import products_memory
from ...recipe import Grouped
from ..finite import require_finite_result
from .narrow import cut_memory, padded_shared
from .step import LayerWork, Sizes, Step


class Shrink(Step):
    """Takes the source's experts: a fit of the whole layer frees them."""

    def __call__(self, work: LayerWork) -> None:
        assert isinstance(work.merge, Grouped)
        shrinking = Shrinking(
            work.mixture,
            work.required_text,
            work.merge,
            work.recipe.seed,
            work.recipe.calibration.error_weights,
            shared=partial(work.source.shared, work.layer),
            progress=work.progress,
            scores=work.scores,
        )
        work.mixture = work.mixture.without_experts()
        with work.source.named(work.layer):
            smaller, work.output = shrinking.run()
        for name, matrices in smaller.experts.items():
            numbered = {f"expert {number} {name}": matrix for number, matrix in enumerate(matrices)}
            require_finite_result(work.layer, numbered, work.recipe)
        require_finite_result(work.layer, {"router": smaller.router, **shrinking.refitted}, work.recipe)
        work.router, work.bias, work.experts = smaller.router, smaller.bias, smaller.experts
        work.shared = padded_shared(work, shrinking.refitted, work.merge.width)
        work.target, work.shared_delta = shrinking.target, shrinking.shared_output_delta
        work.statistics = {"cosines": shrinking.cosines, "usage": torch.tensor(shrinking.record["usage"])}
        if shrinking.stay is not None:
            work.statistics["neurons"] = shrinking.stay.to(torch.int32)
        work.record |= shrinking.record

    def memory(self, sizes: Sizes) -> int:
        """The smaller layer, its largest group, sums of curvature, and outputs of experts or what a fit holds."""
        assert isinstance(self.recipe.merge, Grouped)
        shape, fit = sizes.shape, self.recipe.merge.fit.kind
        width = self.recipe.merge.width or shape.width
        held = products_memory(sizes.tokens, sizes.experts) if fit != "none" else 0
        if fit == "layer":
            active = min(shape.top_k, sizes.experts)
            widths = shape.hidden, width, shape.shared_width
            held = max(held, fit_memory(*widths, sizes.experts, active, sizes.tokens))
        smaller = sizes.layer * sizes.experts // shape.experts
        if width < shape.width:
            held = max(held, smaller * width // shape.width + cut_memory(sizes, sizes.experts))
        return smaller + sizes.layer // 2 + held + sums_memory(shape.hidden, shape.width)


STEP = Shrink
