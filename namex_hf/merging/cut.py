"""Experts of a layer with fewer neurons each: gates and ups as they were, downs that make up for what is gone."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..progress import ProgressCallback, ProgressEvent, no_progress
from ..recipe.choices import Neurons
from .experts import Expert, Experts, NotFiniteError
from .moments import Moments
from .neurons import neurons_that_stay, refitted, ridged

ROWS = ("gate_proj", "up_proj", "gate_proj.bias", "up_proj.bias")  # one row a neuron


@dataclass(frozen=True)
class Cut:
    """What is cut, to which width.

    Memory: the narrower experts in their dtype; one expert in float32, four times ``[all, all]`` in float64, and what
    its `Moments` say.
    """

    experts: Experts
    moments: Moments
    width: int
    neurons: Neurons
    seed: int = 0
    progress: ProgressCallback = no_progress
    scores: Tensor | None = None  # [N, all], under ``neurons: gradient``

    def run(self) -> tuple[Expert, Tensor]:
        """All experts, and the numbers of the neurons that stay, int64 ``[N, width]``, ascending.

        Raises:
            NotFiniteError: an expert holds NaN or infinity.
        """
        experts, each, stay = self.experts, [], []
        for number in range(experts.count):
            expert = experts.expert(number)
            chosen, down = self.of_expert(number, expert)
            stay.append(chosen.cpu())
            each.append(with_neurons(expert, stay[-1], down))
            self.progress(ProgressEvent("narrowed", done=number + 1, total=experts.count))
        return each[0].of(lambda name: torch.stack([one[name] for one in each]), each[0]), torch.stack(stay)

    def of_expert(self, number: int, expert: Expert) -> tuple[Tensor, Tensor]:
        """The neurons of an expert that stay, and its down matrix for them.

        With fewer tokens than neurons that stay there is nothing to refit to: the neurons of the largest weights stay,
        a super expert's before these, and their downs as they are.
        """
        moment, carry = self.moments.of(number, expert)
        own, carry = expert.to(moment), carry[: self.width]
        for name, matrix in own.items():
            if not matrix.isfinite().all():
                raise NotFiniteError(number, name)
        if self.moments.tokens(number) < self.width:
            sizes = own.down.norm(dim=0) * own.up.norm(dim=1) * (1 if own.gate is None else own.gate.norm(dim=1))
            stay = sizes.index_fill(0, carry, math.inf).topk(self.width).indices.sort().values
            return stay, own.down[:, stay]
        return self.choose(number, moment, own.down, carry)

    def choose(self, number: int, moment: Tensor, down: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """The neurons that stay of an expert, and its down matrix for them.

        Args:
            moment: of its neurons, without a ridge, ``[all, all]``.
            down: what all of them should give, ``[hidden, all]``.
            carry: numbers of at most `width` neurons that stay in any case, ascending.
        """
        moment, seed = ridged(moment), (self.seed * self.experts.count + number) % (1 << 63)
        scores = None if self.scores is None else self.scores[number].to(moment)
        stay = neurons_that_stay(moment, down, self.width, self.neurons, carry, seed, scores)
        return stay, refitted(moment, down, stay)


def with_neurons(expert: Expert, stay: Tensor, down: Tensor) -> Expert:
    """An expert with some of its neurons, bit for bit, and another down matrix, rounded to the old one's dtype."""
    kept = expert.of(lambda name: expert[name][stay] if name in ROWS else expert[name], expert)
    return replace(kept, down=down.to(expert.down))
