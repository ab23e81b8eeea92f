"""The base expert: stored in the layer, then taken on through it (paper eq. 3, 7 and 9)."""

from functools import partial

from ...merging.base import own_base
from ...merging.propagation import PropagationState, propagate
from ...recipe import AroundBase
from ..finite import require_finite_result
from .step import LayerForm, LayerWork, Shapes, Step


class Propagate(Step):
    def __call__(self, work: LayerWork) -> None:
        merge, source, experts = work.merge, work.source, work.mixture.experts
        assert isinstance(merge, AroundBase)
        with source.named(work.layer):
            base = work.base or PropagationState(
                own_base(merge.base, experts, partial(source.shared, work.layer), source.shape.width)
            )
            stored = {f"base.{name}": matrix.to(experts.dtype) for name, matrix in base.base.items()}
            if work.base is not None:  # before a base that is not finite is taken for an expert that is not
                require_finite_result(work.layer, stored, work.recipe)
            step = propagate(experts, base, merge, work.position, device=work.recipe.device)
        if not work.stays_sparse:
            work.add(stored)
        work.record["games"] = step.record
        work.statistics = {"cosines": step.cosines, **work.statistics}
        work.base = step.state

    def added(self, form: LayerForm) -> Shapes:
        names = () if form.sparse else ("gate_proj", "up_proj", "down_proj")
        return {f"base.{name}": (form.shape.of(name), form.expert_dtype) for name in names}


STEP = Propagate
