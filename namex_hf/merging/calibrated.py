"""A layer with fewer experts, merged on what calibration text showed of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .experts import PROJECTIONS, Experts, grams
from .grouping import Groups, groups_by_damage, groups_by_outputs, groups_by_router, groups_by_weights
from .members import Tuning, gather, merge_members
from .record import cosines
from .refit import refit_downs
from .router_fit import answers, fit_router, gate_values
from .routing import Activation, Routing, answer, route, routed_output

OUTPUT_TOKENS = 4096  # that every expert answers, used or not, where groups are found by outputs
FIT_TOKENS = 16384  # that the router's rows are fitted on
SWEEPS = 2  # over the downs
ROUNDS = 2  # of fitting rows and downs in turn
TINY = torch.finfo(torch.float32).tiny  # in the place of 0, where experts are zero


@dataclass(frozen=True)
class Choice:
    """How a layer is made smaller, given text."""

    count: int
    tuning: Tuning
    grouping: str = "damage"  # damage, outputs, router, weights
    down: str = "refit"  # merge, refit
    fit: str = "none"  # none, router
    fit_steps: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Mixture:
    """A layer's routed experts."""

    experts: Experts  # N, in any floating dtype
    router: torch.Tensor  # [N, hidden]
    top_k: int
    renormalises: bool
    activation: Activation

    def expert(self, number: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """One expert's matrices in the dtype of ``like``, and where it is."""
        return {name: self.experts[name][number].to(like) for name in PROJECTIONS}

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
    held_out: torch.Tensor  # bool [sequences]: not for the fit of the router's rows, but for choosing among them


@dataclass
class Shrinking:
    """A layer on the way to fewer experts.

    Memory: the K experts in their dtype, three times ``[tokens, hidden]`` beside the text, a copy of the largest
    group, and what `router_fit.Answers` takes.
    """

    source: Mixture
    text: Text
    choice: Choice
    advance: Callable[[str], None] = lambda what: None
    record: dict[str, Any] = field(default_factory=dict)

    def run(self) -> tuple[Mixture, torch.Tensor]:
        """The layer with fewer experts, and its routed output to the text.

        Raises:
            NotFiniteError: an expert holds NaN or infinity.
        """
        text, count = self.text, len(self.source.router)
        self.wanted = self.source.output(text.inputs, text.routing)
        self.mass = text.routing.mass(count).cpu()
        nothing = {name: torch.zeros(self.source.experts[name][0].shape) for name in PROJECTIONS}
        self.gram = grams(self.source.experts, nothing, "expert", text.inputs.device)[0]
        self.cosines = cosines(self.gram[None])
        self.record |= {"usage": text.routing.count(count).tolist(), "mass": self.mass.tolist(), "games": []}
        if self.choice.count == count:
            return self.source, self.wanted
        self.weight = self.balanced()
        self.groups = self.find_groups()
        self.record |= {"groups": [list(group) for group in self.groups], "errors": [], "fits": []}
        self.result = Mixture(
            self.merge(),
            self.average_rows(),
            min(self.source.top_k, self.choice.count),
            self.source.renormalises,
            self.source.activation,
        )
        output = self.note("merged", self.output())
        for _ in range(ROUNDS if self.choice.fit == "router" and self.choice.down == "refit" else 1):
            if self.choice.fit == "router" and self.choice.count > 1:  # one expert has all the mass whatever its row
                self.fit_rows()
                output = self.note("router", self.output())
            if self.choice.down == "refit":
                output = self.note("down", self.refit())
        return self.result, output

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
        return self.result.output(self.text.inputs, self.result.route(self.text.inputs))

    def note(self, stage: str, output: torch.Tensor) -> torch.Tensor:
        """Write down the output's error, relative to the output wanted."""
        heavy = self.weight[:, None]
        error, energy = ((heavy * part).square().sum() for part in (output - self.wanted, self.wanted))
        self.record["errors"].append({"stage": stage, "error": float(error / energy.clamp(min=TINY))})
        self.advance(stage)
        return output

    def find_groups(self) -> Groups:
        """Which experts become one."""
        source, text, choice = self.source, self.text, self.choice
        if choice.grouping == "weights":
            return groups_by_weights(self.gram, choice.count)
        every = max(1, len(text.inputs) // OUTPUT_TOKENS)
        inputs = text.inputs[::every]
        gates = gate_values(inputs, source.router.to(inputs), source.top_k, source.renormalises)
        if choice.grouping == "router":
            return groups_by_router(gates, choice.count)
        if choice.grouping == "outputs":
            return groups_by_outputs(self.mean_answers(inputs), choice.count)
        gates = gates * self.weight[::every, None]
        known = answers(
            inputs, inputs, len(source.router), lambda number: source.expert(number, inputs), source.activation
        )
        return groups_by_damage(known.gram, gates, choice.count)

    def mean_answers(self, inputs: torch.Tensor) -> torch.Tensor:
        """Every expert's mean answer to tokens, used by it or not: float64 ``[N, hidden]``."""
        source = self.source
        return torch.stack(
            [
                answer(inputs, source.expert(number, inputs), source.activation).double().mean(0)
                for number in range(len(source.router))
            ]
        ).cpu()

    def merge(self) -> dict[str, torch.Tensor]:
        """One expert a group, in the experts' dtype; a group of one is its expert, bit for bit."""
        source, text, tuning = self.source, self.text, self.choice.tuning
        result = {name: torch.stack([source.experts[name][group[0]] for group in self.groups]) for name in PROJECTIONS}
        for place, group in enumerate(self.groups):
            if len(group) == 1:
                continue
            ranked = tuple(sorted(group, key=lambda number: -float(self.mass[number])))
            members = gather(
                source.experts, ranked, text.inputs, self.weighted(text.routing), source.activation, tuning.align
            )
            merged, games = merge_members(members, tuning)
            for name in PROJECTIONS:
                result[name][place] = merged[name]
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
        text, choice, result = self.text, self.choice, self.result
        every = max(1, -(-len(text.inputs) // FIT_TOKENS))
        inputs, weight = text.inputs[::every], self.weight[::every]
        held_out = text.held_out.repeat_interleave(len(text.inputs) // text.sequences)[::every]
        known = answers(
            inputs, self.wanted[::every], choice.count, lambda k: result.expert(k, inputs), result.activation
        ).weighted(weight)
        fitted = fit_router(
            inputs, known, result.router, result.top_k, result.renormalises, held_out, choice.fit_steps, choice.seed
        )
        self.record["fits"].append({"before": fitted.before, "after": fitted.after, "steps": fitted.steps})
        result.router.copy_(fitted.router)

    def refit(self) -> torch.Tensor:
        """Refit every ``down_proj`` under the router as it stands; returns the output."""
        inputs, result = self.text.inputs, self.result

        def keep(place: int, down: torch.Tensor) -> torch.Tensor:
            result.experts["down_proj"][place].copy_(down)
            return result.experts["down_proj"][place].to(inputs)

        return refit_downs(
            inputs,
            result.route(inputs),
            self.choice.count,
            lambda k: result.expert(k, inputs),
            self.wanted,
            result.activation,
            self.choice.tuning.ridge,
            SWEEPS,
            self.weight,
            keep,
        )
