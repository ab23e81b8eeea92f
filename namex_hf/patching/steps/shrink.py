"""``merge: grouped`` on calibration text: groups, weights, rows and downs follow what the layer does with the text."""

from typing import Any

from ...merging.calibrated import Shrinking
from ...merging.curvature import sums_memory
from ...merging.layer_fit import fit_memory
from ...merging.router_fit import products_memory
from ...recipe import Grouped
from .rewrite import Rewrite, cut_memory
from .step import LayerWork, Sizes, Tensors


class Shrink(Rewrite):
    kind = Shrinking

    def more(self, work: LayerWork) -> dict[str, Any]:
        return {"scores": work.scores}

    def statistics(self, rewriting: Shrinking) -> Tensors:
        return {"cosines": rewriting.cosines}

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
