"""``merge: narrow``: every expert and the router stay, and of each expert the neurons that matter most."""

from functools import partial
from typing import Any

from ...merging.layer_fit import fit_memory
from ...merging.narrow import Narrowing
from ...recipe import Narrow
from .rewrite import Rewrite, cut_memory
from .step import LayerWork, Sizes


class NarrowExperts(Rewrite):
    kind = Narrowing

    def __call__(self, work: LayerWork) -> None:
        super().__call__(work)
        if work.moments is not None and not work.moments.is_complete:
            work.moments.finish(work.layer, work.record)

    def more(self, work: LayerWork) -> dict[str, Any]:
        if work.moments is None:
            return {"gradients": work.gradients}
        if work.moments.is_complete:
            return {"known": work.moments.layer(work.layer)}
        return {"save": partial(work.moments.save, work.layer)}

    def memory(self, sizes: Sizes) -> int:
        """The narrower layer, one expert and its neurons on its tokens, its moments, or what a fit holds."""
        assert isinstance(self.recipe.merge, Narrow)
        shape, width = sizes.shape, self.recipe.merge.width
        assert width is not None
        held = cut_memory(sizes, shape.experts) + (4 * sizes.tokens * shape.hidden if self.recipe.merge.sweeps else 0)
        if self.recipe.merge.fit.kind == "layer":
            sizes_of_fit = (shape.hidden, width, shape.shared_width, shape.experts, shape.top_k, sizes.tokens)
            held = max(held, fit_memory(*sizes_of_fit))
        return sizes.layer * width // shape.width + held


STEP = NarrowExperts
