"""A layer with fewer experts, merged on its activations on calibration text."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from ..recipe import Grouped
from ..recipe.choices import FitKind
from .combine import average_bias, averages
from .controls import random_experts, shared_experts
from .experts import Expert, grams
from .grouping import Groups, groups_by_damage, groups_by_outputs, groups_by_router, groups_by_weights
from .members import gather, merge_members
from .moe_layer import MoELayer
from .moments import TextMoments
from .record import cosines
from .refit import refit_downs
from .rewriting import Rewriting
from .router_fit import RouterProblem, fit_router, output_products
from .routing import TokenRouting, expert_output, on_tokens
from .super_experts import super_experts
from .weightings import ExpertStatistics


@dataclass
class Shrinking(Rewriting[Grouped]):
    """A layer on the way to fewer experts.

    Memory: that of `Rewriting`, the K experts in their dtype, a copy of the largest group, and what
    `router_fit.OutputProducts` takes, before a fit of the layer.
    """

    fits: bool = True  # False: merged and refitted alone, whatever the recipe's fit
    scores: ExpertStatistics | None = None  # of another run: they stand for the text, of which there is nothing
    gram: torch.Tensor = field(init=False)  # float64 [N, N], of whole experts
    groups: Groups = field(init=False)

    @property
    def fit(self) -> FitKind:
        return self.merge.fit.kind if self.fits else "none"

    @property
    def is_source(self) -> bool:
        """Whether all experts stay as they are."""
        return self.merge.experts == len(self.source.router) and self.merge.width is None

    @property
    def cosines(self) -> torch.Tensor:
        """Between whole experts, float32 ``[1, N, N]``."""
        return cosines(self.gram[None])

    def run(self) -> tuple[MoELayer, torch.Tensor]:
        """As `Rewriting.run`."""
        self.gram = grams(self.source.experts, self.source.experts.zeros(), "expert", self.text.inputs.device)[0]
        self.record |= {"usage": self.usage.tolist(), "mass": self.mass.tolist(), "games": []}
        if self.is_source:
            return self.source, self.target
        self.groups = self.find_groups()
        self.record |= {"groups": [list(group) for group in self.groups], "errors": [], "fits": []}
        if self.merge.operator == "keep":
            self.groups = tuple((max(group, key=self.pruning_score),) for group in self.groups)
            self.record["kept"] = [group[0] for group in self.groups]
        gate = self.source.gate.of(self.merge.experts)
        # The source gets no local name here, so that `fit_all` can free its experts.
        rows = averages(self.source.router, self.groups, self.mass)
        bias = average_bias(self.source.bias, self.groups, self.mass)
        self.result = replace(self.source, experts=self.initial_experts(), router=rows, gate=gate, bias=bias)
        if self.scores is not None:
            return self.result, self.target
        output = self.record_error("merged", self.output())
        for _ in range(self.settings.rounds if self.fit != "none" and self.merge.down == "refit" else 1):
            if self.fit != "none" and self.merge.experts > 1:  # one expert has all the mass whatever its row
                self.fit_rows()
                output = self.record_error("router", self.output())
            if self.merge.down == "refit":
                self.refit(output)
                self.record_error("down", output)
        if self.merge.width is not None:
            output = self.narrow()
        if self.fit == "layer":
            self.fit_all()
            output = self.record_error("layer", self.output())
        return self.result, output

    @cached_property
    def target(self) -> torch.Tensor:
        """What the routed output is compared with and fitted to, float32 ``[tokens, hidden]``."""
        if self.text.target is None or self.is_source:
            return self.measure()
        return self.text.target

    @property
    def usage(self) -> torch.Tensor:
        """Token counts, int64 ``[N]``."""
        return self.text.routing.count(len(self.source.router)) if self.scores is None else self.scores.usage.long()

    @cached_property
    def mass(self) -> torch.Tensor:
        """Sums of gate values, float64 ``[N]``."""
        if self.scores is not None and self.scores.mass is not None:
            return self.scores.mass
        return self.text.routing.mass(len(self.source.router)).cpu()

    @cached_property
    def statistics(self) -> ExpertStatistics:
        """Token counts, and saliencies where the recipe weighs by them."""
        if self.scores is not None:
            if self.scores.saliency is not None:
                self.record["saliency"] = self.scores.saliency.tolist()
            return self.scores
        usage = self.usage.double().cpu()
        if self.merge.weights_by != "saliency":
            return ExpertStatistics(usage)
        _ = self.target  # on the way to which saliency is measured, where it is the source's own output
        if self.saliency is None:
            self.measure()
        assert self.saliency is not None
        self.record["saliency"] = self.saliency.tolist()
        return ExpertStatistics(usage, self.saliency)

    @cached_property
    def protected(self) -> list[int]:
        """Super experts that stay as they are: at least one expert is left for the others."""
        if self.merge.is_control:
            return []
        if self.scores is None:
            _ = self.target  # on the way to which peaks are measured, where it is the source's own output
            if self.peaks is None:
                self.measure()
        peaks = self.peaks if self.scores is None else self.scores.peaks
        if peaks is None:  # scores of a release that did not measure them
            return []
        found = super_experts(peaks)
        self.record |= {"peaks": peaks.tolist(), "super_experts": found}
        return found[: self.merge.experts - 1]

    def pruning_score(self, number: int) -> float:
        """Score by which experts are retained: saliency if computed, else token count."""
        scores = self.statistics.usage if self.statistics.saliency is None else self.statistics.saliency
        return float(scores[number])

    def find_groups(self) -> Groups:
        """Which experts become one. A super expert stays alone."""
        others = [number for number in range(len(self.source.router)) if number not in self.protected]
        groups = self.groups_of(others, self.merge.experts - len(self.protected))
        named = [tuple(others[place] for place in group) for group in groups]
        return tuple(sorted([*named, *((number,) for number in self.protected)]))

    def groups_of(self, others: list[int], count: int) -> Groups:
        """``count`` groups of some experts, as places in ``others``."""
        source, text, merge = self.source, self.text, self.merge
        if merge.grouping == "none":
            best = sorted(range(len(others)), key=lambda place: -self.pruning_score(others[place]))
            return tuple((place,) for place in best[:count])
        if merge.grouping == "weights":
            return groups_by_weights(self.gram[others][:, others], count)
        every = max(1, len(text.inputs) // self.settings.grouping_tokens)
        inputs = text.inputs[::every]
        if merge.grouping == "router":
            return groups_by_router(source.gates(inputs)[:, others], count)
        if merge.grouping == "outputs":
            return groups_by_outputs(self.mean_outputs(inputs)[others], count)
        gates = source.gates(inputs) * self.weight[::every, None]
        gram = output_products(inputs, inputs, source, chunk_bytes=self.settings.chunk_bytes).gram
        if self.protected:  # a copy
            gates, gram = gates[:, others], gram[:, others][:, :, others]
        return groups_by_damage(gram, gates, count)

    def mean_outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Every expert's mean output over all the inputs, whatever the router chose: float64 ``[N, hidden]``."""
        source, means = self.source, []
        for number in range(len(source.router)):
            output = on_tokens(expert_output, inputs, source.experts.expert(number), source.activation)
            means.append(output.double().mean(0))
        return torch.stack(means).cpu()

    def initial_experts(self) -> Expert:
        """The K experts before any fit, in the experts' dtype."""
        source, merge = self.source, self.merge
        if merge.operator == "random":
            return random_experts(source.experts, merge.experts, self.seed)
        if merge.operator == "shared":
            return shared_experts(self.shared(), source.experts, merge.experts)
        return self.merged_experts()

    def merged_experts(self) -> Expert:
        """One expert a group, in the experts' dtype; a group of one is its expert, bit for bit."""
        source, text, merge = self.source, self.text, self.merge
        result = source.experts.stacked([group[0] for group in self.groups])
        for place, group in enumerate(self.groups):
            if len(group) == 1:
                continue
            ranked = tuple(sorted(group, key=lambda number: -float(self.mass[number])))
            routing = TokenRouting(text.routing.index, text.routing.value * self.weight[:, None])
            own, align = self.statistics.subset(ranked), merge.curvature.align
            members = gather(source.experts, ranked, text.inputs, routing, source.activation, align, own)
            merged, games = merge_members(members, merge)
            result.set_expert(place, merged)
            self.record["games"] += [{"members": list(ranked), **game} for game in games]
        return result

    def fit_rows(self) -> None:
        """Fit the router's rows to the target; the experts stay as they are."""
        text, result, settings = self.text, self.result, self.settings
        every = max(1, -(-len(text.inputs) // settings.router_tokens))
        inputs, weight = text.inputs[::every], self.weight[::every]
        products = output_products(inputs, self.target[::every], result, chunk_bytes=settings.chunk_bytes)
        held_out = text.held_out_tokens[::every]
        problem = RouterProblem(inputs, products.weighted(weight), held_out, result.gate, settings, result.bias)
        fitted = fit_router(problem, result.router, self.merge.fit.steps, self.seed)
        fit = {"of": "router", "before": fitted.before, "after": fitted.after, "steps": fitted.steps}
        self.record["fits"].append(fit)
        result.router.copy_(fitted.router)

    def narrow(self) -> torch.Tensor:
        """Take neurons out of the experts that are left; returns the layer's output."""
        text = replace(self.text, routing=self.result.route(self.text.inputs))
        protected = [place for place, group in enumerate(self.groups) if group[0] in self.protected]
        self.cut(TextMoments(self.source.activation, text, self.weight, protected))
        return self.record_error("narrowed", self.output())

    def refit(self, output: torch.Tensor) -> None:
        """Refit every down matrix under the present router. Args: output, changed in place to what it becomes."""
        inputs, routing = self.text.inputs, self.result.route(self.text.inputs)
        ridge, sweeps = self.merge.curvature.ridge, self.settings.sweeps
        refit_downs(self.result, inputs, routing, output, self.target, self.weight, ridge, sweeps)
