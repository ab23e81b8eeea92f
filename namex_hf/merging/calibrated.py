"""A layer with fewer experts, merged on what calibration text showed of it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..recipe import Grouped
from ..recipe.choices import FitKind
from .experts import Expert, Experts, ExpertWeights, grams
from .grouping import Groups, groups_by_damage, groups_by_outputs, groups_by_router, groups_by_weights
from .layer_fit import BATCH, Problem, fit_layer
from .members import gather, merge_members
from .record import cosines
from .refit import refit_downs
from .router_fit import answers, fit_router, gate_values
from .routing import Activation, Routing, answer, route, routed_output, shared_answer
from .strangers import random_experts, shared_experts
from .weightings import Seen

OUTPUT_TOKENS = 4096  # that every expert answers, used or not, where groups are found by outputs
FIT_TOKENS = 16384  # that the router's rows are fitted on
SWEEPS = 2  # over the downs
ROUNDS = 2  # of fitting rows and downs in turn
TINY = torch.finfo(torch.float32).tiny  # in the place of 0, where experts are zero


@dataclass(frozen=True)
class Mixture:
    """A layer's routed experts."""

    experts: Experts  # N, in any floating dtype
    router: torch.Tensor  # [N, hidden]
    top_k: int
    renormalises: bool
    activation: Activation

    def expert(self, number: int, like: torch.Tensor) -> Expert:
        """One expert's matrices in the dtype of ``like``, and where it is."""
        return self.experts.expert(number).to(like)

    def without_experts(self) -> "Mixture":
        return replace(self, experts=ExpertWeights(None, (), ()))

    def route(self, inputs: torch.Tensor) -> Routing:
        return route(inputs, self.router.to(inputs), self.top_k, self.renormalises)

    def output(self, inputs: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The routed output, float32 ``[tokens, hidden]``."""
        return routed_output(
            inputs, routing, len(self.router), lambda number: self.expert(number, inputs), self.activation
        )


@dataclass(frozen=True)
class Text:
    """What calibration text shows of a layer."""

    inputs: torch.Tensor  # float32 [tokens, hidden], of the mixture
    routing: Routing  # by the layer's own router
    sequences: int  # of equal length, one after the other
    held_out: torch.Tensor  # bool [sequences]: not for the fits by steps, but for choosing among them
    wanted: torch.Tensor | None = None  # float32 [tokens, hidden]; None: what the layer itself answers


@dataclass
class Shrinking:
    """A layer on the way to fewer experts.

    Memory: the K experts in their dtype, three times ``[tokens, hidden]`` beside the text, a copy of the largest
    group, and what `router_fit.Answers` or, after it, `layer_fit.fit_layer` takes, this with twice ``[tokens, hidden]``
    of the shared expert.
    """

    source: Mixture
    text: Text
    merge: Grouped
    seed: int = 0
    fits: bool = True  # False: merged and refitted alone, whatever the recipe's fit
    shared: Callable[[], Mapping[str, torch.Tensor]] = dict  # as `shared_answer` takes it
    advance: Callable[[str], None] = lambda what: None
    record: dict[str, Any] = field(default_factory=dict)
    refitted: dict[str, torch.Tensor] = field(default_factory=dict)  # the shared expert, where it was fitted along
    moved: torch.Tensor | None = None  # float32 [tokens, hidden]: what its answer has become more than it was

    @property
    def fit(self) -> FitKind:
        return self.merge.fit.kind if self.fits else "none"

    def run(self) -> tuple[Mixture, torch.Tensor]:
        """The layer with fewer experts, and its routed output to the text, with what the shared expert moved by.

        Raises:
            NotFiniteError: an expert holds NaN or infinity.
        """
        text, count = self.text, len(self.source.router)
        if self.merge.experts == count or text.wanted is None:
            self.wanted = self.source.output(text.inputs, text.routing)
        else:
            self.wanted = text.wanted
        self.mass = text.routing.mass(count).cpu()
        self.gram = grams(self.source.experts, self.source.experts.zeros(), "expert", text.inputs.device)[0]
        self.cosines = cosines(self.gram[None])
        self.record |= {"usage": text.routing.count(count).tolist(), "mass": self.mass.tolist(), "games": []}
        if self.merge.experts == count:
            return self.source, self.wanted
        self.weight = self.balanced()
        self.groups = self.find_groups()
        self.record |= {"groups": [list(group) for group in self.groups], "errors": [], "fits": []}
        if self.merge.operator == "keep":
            self.groups = tuple((max(group, key=lambda number: float(self.standing[number])),) for group in self.groups)
            self.record["kept"] = [group[0] for group in self.groups]
        self.made = self.begin()
        self.result = Mixture(
            self.made,
            self.average_rows(),
            min(self.source.top_k, self.merge.experts),
            self.source.renormalises,
            self.source.activation,
        )
        output = self.note("merged", self.output())
        for _ in range(ROUNDS if self.fit != "none" and self.merge.down == "refit" else 1):
            if self.fit != "none" and self.merge.experts > 1:  # one expert has all the mass whatever its row
                self.fit_rows()
                output = self.note("router", self.output())
            if self.merge.down == "refit":
                output = self.note("down", self.refit())
        if self.fit == "layer":
            self.fit_all()
            output = self.note("layer", self.output())
        return self.result, output

    @cached_property
    def seen(self) -> Seen:
        """What the text shows of the experts; saliencies where they are asked for."""
        source, text = self.source, self.text
        usage = text.routing.count(len(source.router)).double().cpu()
        if self.merge.weights_by != "saliency":
            return Seen(usage)
        saliency = torch.zeros_like(usage)
        for number in range(len(usage)):
            token, gate = text.routing.of(number)
            if len(token):
                given = answer(text.inputs[token], source.expert(number, text.inputs), source.activation)
                saliency[number] = float((gate * given.norm(dim=1)).double().mean())
        self.record["saliency"] = saliency.tolist()
        return Seen(usage, saliency)

    @property
    def standing(self) -> torch.Tensor:
        """What an expert is kept by: its saliency, where that weighs, or the tokens that it received."""
        return self.seen.usage if self.seen.saliency is None else self.seen.saliency

    def balanced(self) -> torch.Tensor:
        """Weights ``[tokens]`` of errors under which all sequences count alike, their mean square 1.

        The routed output is several times larger on some texts than on others; unweighted, those texts would be all
        that is fitted. (Weighting token by token instead, by the output or by the residual stream, measured worse.)
        """
        energy = self.wanted.square().sum(1).view(self.text.sequences, -1).mean(1)
        weight = energy.clamp(min=1e-12 * float(energy.mean()) + TINY).rsqrt()
        weight = weight / weight.square().mean().sqrt()
        return weight.repeat_interleave(len(self.wanted) // self.text.sequences)

    def weighted(self, routing: Routing) -> Routing:
        """A routing whose gate values carry the tokens' weights."""
        return Routing(routing.index, routing.value * self.weight[:, None])

    def output(self) -> torch.Tensor:
        output = self.result.output(self.text.inputs, self.result.route(self.text.inputs))
        return output if self.moved is None else output.add_(self.moved)

    def note(self, stage: str, output: torch.Tensor) -> torch.Tensor:
        """Write down the output's error, relative to the output wanted."""
        heavy = self.weight[:, None]
        error, energy = ((heavy * part).square().sum() for part in (output - self.wanted, self.wanted))
        self.record["errors"].append({"stage": stage, "error": float(error / energy.clamp(min=TINY))})
        self.advance(stage)
        return output

    def find_groups(self) -> Groups:
        """Which experts become one."""
        source, text, merge = self.source, self.text, self.merge
        if merge.grouping == "none":
            best = sorted(range(len(source.router)), key=lambda number: -float(self.standing[number]))
            return tuple((number,) for number in sorted(best[: merge.experts]))
        if merge.grouping == "weights":
            return groups_by_weights(self.gram, merge.experts)
        every = max(1, len(text.inputs) // OUTPUT_TOKENS)
        inputs = text.inputs[::every]
        gates = gate_values(inputs, source.router.to(inputs), source.top_k, source.renormalises)
        if merge.grouping == "router":
            return groups_by_router(gates, merge.experts)
        if merge.grouping == "outputs":
            return groups_by_outputs(self.mean_answers(inputs), merge.experts)
        gates = gates * self.weight[::every, None]
        known = answers(
            inputs, inputs, len(source.router), lambda number: source.expert(number, inputs), source.activation
        )
        return groups_by_damage(known.gram, gates, merge.experts)

    def mean_answers(self, inputs: torch.Tensor) -> torch.Tensor:
        """Every expert's mean answer to tokens, used by it or not: float64 ``[N, hidden]``."""
        source = self.source
        return torch.stack(
            [
                answer(inputs, source.expert(number, inputs), source.activation).double().mean(0)
                for number in range(len(source.router))
            ]
        ).cpu()

    def begin(self) -> Expert:
        """The K experts before any fit, in the experts' dtype."""
        source, merge = self.source, self.merge
        if merge.operator == "random":
            return random_experts(source.experts, merge.experts, self.seed)
        if merge.operator == "shared":
            return shared_experts(self.shared(), source.experts, merge.experts)
        return self.merged()

    def merged(self) -> Expert:
        """One expert a group, in the experts' dtype; a group of one is its expert, bit for bit."""
        source, text, merge = self.source, self.text, self.merge
        result = source.experts.stacked([group[0] for group in self.groups])
        for place, group in enumerate(self.groups):
            if len(group) == 1:
                continue
            ranked = tuple(sorted(group, key=lambda number: -float(self.mass[number])))
            usage, saliency = self.seen.usage[list(ranked)], self.seen.saliency
            seen = Seen(usage, None if saliency is None else saliency[list(ranked)])
            heard = self.weighted(text.routing)
            members = gather(source.experts, ranked, text.inputs, heard, source.activation, merge.curvature.align, seen)
            merged, games = merge_members(members, merge)
            result.set_expert(place, merged)
            self.record["games"] += [{"members": list(ranked), **game} for game in games]
        return result

    def average_rows(self) -> torch.Tensor:
        """A row a group: the mean of its members' rows, each as heavy as its gate values."""
        rows = []
        for group in self.groups:
            mass = self.mass[list(group)]
            share = mass / mass.sum() if mass.sum() > 0 else torch.full_like(mass, 1 / len(mass))
            rows.append(share.float() @ self.source.router[list(group)].float())
        return torch.stack(rows).to(self.source.router)

    def fit_rows(self) -> None:
        """Fit the router's rows, with the experts as they are."""
        text, merge, result = self.text, self.merge, self.result
        every = max(1, -(-len(text.inputs) // FIT_TOKENS))
        inputs, weight = text.inputs[::every], self.weight[::every]
        held_out = text.held_out.repeat_interleave(len(text.inputs) // text.sequences)[::every]
        known = answers(
            inputs, self.wanted[::every], merge.experts, lambda k: result.expert(k, inputs), result.activation
        ).weighted(weight)
        fitted = fit_router(
            inputs, known, result.router, result.top_k, result.renormalises, held_out, merge.fit.steps, self.seed
        )
        fit = {"of": "router", "before": fitted.before, "after": fitted.after, "steps": fitted.steps}
        self.record["fits"].append(fit)
        result.router.copy_(fitted.router)

    def fit_all(self) -> None:
        """Fit rows, experts and the shared expert together; the source's experts are let go of first."""
        text, merge, result = self.text, self.merge, self.result
        self.source = self.source.without_experts()
        held_out = text.held_out.repeat_interleave(len(text.inputs) // text.sequences)
        self.refitted = {part: tensor.clone() for part, tensor in self.shared().items()}
        moved = -self.shared_output()
        problem = Problem(
            text.inputs,
            self.wanted - moved,
            self.weight,
            held_out,
            result.top_k,
            result.renormalises,
            result.activation,
        )

        def advance(step: int) -> None:
            self.advance(f"fitted, step {step} of {merge.fit.steps}")

        fitted = fit_layer(problem, self.made, result.router, self.refitted, merge.fit.steps, self.seed, advance)
        del problem
        self.moved = moved.add_(self.shared_output())
        self.record["fits"].append({"of": "layer", **asdict(fitted)})

    def shared_output(self) -> torch.Tensor:
        """The answer of the shared expert as it now is, float32 ``[tokens, hidden]``."""
        output = torch.zeros_like(self.text.inputs)
        shared = {part: tensor.to(output) for part, tensor in self.refitted.items()}
        if shared:
            for some, place in zip(self.text.inputs.split(BATCH), output.split(BATCH), strict=True):
                place.copy_(shared_answer(some, shared, self.result.activation))
        return output

    def refit(self) -> torch.Tensor:
        """Refit every ``down_proj`` under the router as it stands; returns the output."""
        inputs, result = self.text.inputs, self.result

        def keep(place: int, down: torch.Tensor) -> torch.Tensor:
            return result.experts.down[place].copy_(down).to(inputs)

        return refit_downs(
            inputs,
            result.route(inputs),
            self.merge.experts,
            lambda k: result.expert(k, inputs),
            self.wanted,
            result.activation,
            self.merge.curvature.ridge,
            SWEEPS,
            self.weight,
            keep,
        )
