"""A layer that keeps every expert and its router, with fewer neurons in each expert."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from ..recipe import Narrow
from .moe_layer import MoELayer
from .moments import KnownMoments, TextMoments
from .rewriting import Rewriting
from .super_experts import super_experts


@dataclass
class Narrowing(Rewriting[Narrow]):
    """A layer on the way to narrower experts. Memory: that of `Rewriting`, and the narrower experts in their dtype."""

    known: KnownMoments | None = None  # they stand for the text, of which there is nothing
    save: Callable[[int, Tensor, Tensor], None] | None = None  # as `TextMoments`
    gradients: Tensor | None = None  # [N, all], scores of neurons under ``neurons: gradient``

    def run(self) -> tuple[MoELayer, Tensor]:
        """As `Rewriting.run`."""
        text, count = self.text, self.source.experts.count
        self.record |= {"usage": text.routing.count(count).tolist(), "mass": text.routing.mass(count).tolist()}
        self.record |= {"games": [], "errors": [], "fits": []}
        _ = self.weight  # before a cut, as the target is the output of all neurons
        self.result = replace(self.source, router=self.source.router.clone())
        if self.known is not None:
            self.record |= self.known.record
            self.cut(self.known)
            return self.result, self.target
        protected = self.record["super_experts"]
        moments = TextMoments(self.source.activation, text, self.weight, protected, self.save)
        self.cut(moments, self.gradients)
        self.source = self.source.without_experts()  # which can be freed now, before a fit
        output = self.record_error("narrowed", self.result.output(text.inputs, text.routing))
        if self.merge.fit.kind == "layer":
            self.fit_all()
            output = self.record_error("layer", self.output())
        return self.result, output

    @cached_property
    def target(self) -> Tensor:
        """The source's routed output. On the way the largest entry of each expert's outputs is recorded."""
        output = self.measure()
        assert self.peaks is not None
        self.record |= {"peaks": self.peaks.tolist(), "super_experts": super_experts(self.peaks)}
        return output
