"""``merge: grouped`` without calibration text: experts are clustered by their weights, each group becomes one."""

from ...merging.groups import merge_layer
from ...recipe import Grouped
from ..finite import require_finite_result
from .step import LayerWork, Step


class GroupByWeights(Step):
    """The experts of the result are made one at a time, when they are asked for: the source's are held until then."""

    def __call__(self, work: LayerWork) -> None:
        assert isinstance(work.merge, Grouped)
        with work.source.named(work.layer):
            merged = merge_layer(
                work.mixture, work.source.norm(work.layer), work.merge, work.recipe.seed, work.recipe.device
            )
        require_finite_result(work.layer, {"router": merged.router}, work.recipe)
        work.router, work.bias, work.experts = merged.router, merged.bias, merged
        work.statistics["cosines"] = merged.cosines
        work.record |= merged.record


STEP = GroupByWeights
