"""``align``: every expert's neurons in the order in which they match those of the most used one."""

from ...merging.alignment import layer_orders, reorder
from ...progress import ProgressEvent
from ...recipe import Soft
from .step import LayerWork, Step


class Align(Step):
    """Reorders the source's experts in place: they are the step's to change."""

    def __call__(self, work: LayerWork) -> None:
        assert isinstance(work.merge, Soft)
        mixture, text = work.mixture, work.required_text
        with work.source.named(work.layer):
            work.orders = layer_orders(
                mixture.experts, work.merge.curvature.align, text.inputs, text.routing, mixture.activation
            )
        reorder(mixture.experts, work.orders)
        work.progress(ProgressEvent("aligned"))


STEP = Align
