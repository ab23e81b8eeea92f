"""A layer that keeps every expert and its router, with fewer neurons in each expert."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..progress import ProgressEvent
from ..recipe import Narrow
from .cut import Cut, with_neurons
from .moe_layer import MoELayer
from .moments import KnownMoments, TextMoments
from .neurons import RIDGE
from .refit import refitted_down
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
        cut = self.cut(moments, self.gradients)
        for _ in range(self.merge.sweeps or 0):
            self.sweep(cut, moments)
        del cut
        self.source = self.source.without_experts()  # which can be freed now, before a fit
        output = self.record_error("narrowed", self.result.output(text.inputs, text.routing))
        if self.merge.fit.kind == "layer":
            self.fit_all()
            output = self.record_error("layer", self.output())
        return self.result, output

    def sweep(self, cut: Cut, moments: TextMoments) -> None:
        """Cut every expert anew, one after another, for what the others leave over of the target.

        It is block coordinate descent on the error of the layer, but for the choice of neurons and rounding.

        Memory: ``[tokens, hidden]``, and what `Cut` says, with an expert's output on its tokens.
        """
        stay, missing = self.stay, self.result.output(self.text.inputs, self.text.routing)
        assert stay is not None
        missing.sub_(self.target).mul_(-self.weight[:, None])
        for number in range(self.source.experts.count):
            token, _ = self.text.routing.of(number)
            if len(token) < stay.shape[1]:
                continue  # as in `Cut.of_expert`: there is nothing to refit to
            expert, old = self.source.experts.expert(number), self.result.experts.expert(number)
            z, carry = moments.activations(number, expert)
            carry = carry[: stay.shape[1]]
            left = missing[token] + z[:, stay[number].to(z.device)] @ old.down.to(z).T
            whole = refitted_down(expert.down.to(z), z, left, torch.ones_like(z[:, 0]), RIDGE)
            chosen, down = cut.choose(number, z.T @ z, whole, carry)
            stay[number] = chosen.cpu()
            new = with_neurons(expert, stay[number], down)
            self.result.experts.set_expert(number, new)
            missing[token] = left - z[:, chosen] @ new.down.to(z).T
            self.progress(ProgressEvent("swept", done=number + 1, total=self.source.experts.count))

    @cached_property
    def target(self) -> Tensor:
        """The source's routed output. On the way the largest entry of each expert's outputs is recorded."""
        output = self.measure()
        assert self.peaks is not None
        self.record |= {"peaks": self.peaks.tolist(), "super_experts": super_experts(self.peaks)}
        return output
