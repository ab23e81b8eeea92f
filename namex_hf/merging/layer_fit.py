"""Rows, experts and shared expert of a layer with fewer experts fitted together to the output wanted of it.

A local regression: no other layer takes part, so that its memory is that of one layer whatever the model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .experts import Expert, Experts
from .router_fit import gate_values
from .routing import Activation, answer, shared_answer

BATCH = 1024
CHECK_EVERY = 50
PATIENCE = 0.25  # of all steps, after which a fit that has not become better is given up
RATE = 0.05  # of a step, relative to the root mean square of a matrix
WARM_UP = 20
CHECKED_TOKENS = 4096  # of those held out, so that a check is no dearer than four steps


@dataclass(frozen=True)
class Problem:
    """What a layer is fitted to. Errors are weighted squares, relative to the energy of the output wanted."""

    inputs: torch.Tensor  # float32 [tokens, hidden]
    wanted: torch.Tensor  # float32 [tokens, hidden], of all that is fitted
    weight: torch.Tensor  # [tokens], of errors
    held_out: torch.Tensor  # bool [tokens]
    top_k: int
    renormalises: bool
    activation: Activation

    def energy(self, tokens: torch.Tensor) -> torch.Tensor:
        heard = self.weight[tokens].square() * self.wanted[tokens].square().sum(1)
        return heard.sum().clamp(min=torch.finfo(torch.float32).tiny)  # experts may be zero

    def missed(self, tokens: torch.Tensor, layer: "Trained") -> torch.Tensor:
        error = layer.output(self.inputs[tokens], self) - self.wanted[tokens]
        return (self.weight[tokens].square() * error.square().sum(1)).sum()

    @torch.no_grad()
    def error(self, tokens: torch.Tensor, layer: "Trained") -> float:
        missed = torch.stack([self.missed(some, layer) for some in tokens.split(BATCH)]).sum()
        return float(missed / self.energy(tokens))


@dataclass(frozen=True)
class Trained:
    """The parameters of a fit, in float32: a matrix of its own an expert and projection, and the router's rows."""

    experts: Experts
    router: torch.Tensor  # [K, hidden]
    shared: dict[str, torch.Tensor]  # as `shared_answer` takes it; empty: it is not fitted

    @classmethod
    def of(
        cls, experts: Expert, router: torch.Tensor, shared: Mapping[str, torch.Tensor], like: torch.Tensor
    ) -> "Trained":
        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(like, copy=True).requires_grad_()

        matrices = experts.map(lambda stacked: [leaf(matrix) for matrix in stacked])
        return cls(matrices, leaf(router), {part: leaf(tensor) for part, tensor in shared.items()})

    def parameters(self) -> list[torch.Tensor]:
        rows = [self.router] if len(self.router) > 1 else []  # one expert has all the mass whatever its row
        return [matrix for matrices in self.experts.values() for matrix in matrices] + rows + list(self.shared.values())

    def output(self, inputs: torch.Tensor, problem: Problem) -> torch.Tensor:
        """The layer's output ``[tokens, hidden]``, differentiable in everything."""
        gates = gate_values(inputs, self.router, problem.top_k, problem.renormalises)
        shared = self.shared
        output = shared_answer(inputs, shared, problem.activation) if shared else torch.zeros_like(inputs)
        for number in range(len(self.router)):
            token = gates[:, number].nonzero()[:, 0]
            if len(token):
                given = answer(inputs[token], self.experts.expert(number), problem.activation)
                output = output.index_add(0, token, gates[token, number, None] * given)
        return output


@dataclass(frozen=True)
class LayerFit:
    """How a fit went. Errors are relative to the energy of the output wanted, on tokens held out."""

    before: float
    after: float
    steps: int  # after which the layer was kept
    tried: int  # steps in all


def fit_layer(
    problem: Problem,
    experts: Expert,
    router: torch.Tensor,
    shared: Mapping[str, torch.Tensor],
    steps: int,
    seed: int,
    advance: Callable[[int], None] = lambda step: None,
) -> LayerFit:
    """Adafactor with a first moment (Shazeer & Stern 2018) on the squared error, cosine schedule, early stopping.

    The layer that is best on the held-out tokens is left in what was given, the start where none is better.
    Deterministic: batches are drawn by a generator of their own.

    Args:
        experts: K, stacked, in any floating dtype: the start; changed in place.
        router: ``[K, hidden]``: the start; changed in place.
        shared: the shared expert as `shared_answer` takes it: the start; changed in place. Empty: ``problem.wanted`` is
            wanted of the routed experts alone.
        advance: told of the steps done.

    Memory: parameters and first moments, each as large as ``experts`` and ``shared`` in float32 (the second moments are
    a row and a column a matrix), the gradient of one matrix, and a batch of `BATCH` tokens through top-k experts and
    the shared one.
    """
    layer = Trained.of(experts, router, shared, problem.inputs)
    descent = Descent(layer.parameters(), steps)
    fitted, checked = (~problem.held_out).nonzero()[:, 0], problem.held_out.nonzero()[:, 0]
    checked = checked[:: max(1, len(checked) // CHECKED_TOKENS)]
    batches = _batches(fitted, seed)
    before = best = problem.error(checked, layer)
    kept_at, lowest, lowest_at, step = 0, math.inf, 0, 0
    with torch.enable_grad():
        while step < steps and step - lowest_at < max(CHECK_EVERY, PATIENCE * steps):
            step += 1
            batch = next(batches)
            descent.prepare(step)
            (problem.missed(batch, layer) / problem.energy(batch)).backward()
            if step % CHECK_EVERY and step < steps:
                continue
            now = problem.error(checked, layer)
            advance(step)
            if now < lowest:
                lowest, lowest_at = now, step
            if now < best:
                best, kept_at = now, step
                _keep(layer, experts, router, shared)
    descent.release()
    return LayerFit(before, best, kept_at, step)


class Descent:
    """An optimiser that steps inside the backward pass, so that one matrix has a gradient at a time."""

    def __init__(self, parameters: list[torch.Tensor], steps: int) -> None:
        from transformers.optimization import Adafactor  # which imports peft: seconds that only a fit needs

        self.steps = steps
        self.each = {
            parameter: Adafactor([parameter], lr=RATE, beta1=0.9, scale_parameter=True, relative_step=False)
            for parameter in parameters
        }
        self.hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in parameters]

    def release(self) -> None:
        """Let go of the parameters: no garbage collection finds the way from one through its hook and back."""
        for hook in self.hooks:
            hook.remove()

    def prepare(self, step: int) -> None:
        """Set the rate of a step, from 1 on."""
        rate = RATE * min(1, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))
        for one in self.each.values():
            one.param_groups[0]["lr"] = rate

    def _take(self, parameter: torch.Tensor) -> None:
        self.each[parameter].step()
        parameter.grad = None


def _batches(tokens: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Batches without end; every token once before one comes again, but for tails."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield from tokens[torch.randperm(len(tokens), generator=draw).to(tokens.device)].split(BATCH)


def _keep(layer: Trained, experts: Expert, router: torch.Tensor, shared: Mapping[str, torch.Tensor]) -> None:
    for number in range(experts.count):
        experts.set_expert(number, layer.experts.expert(number).map(torch.Tensor.detach))
    router.copy_(layer.router.detach())
    for part, tensor in layer.shared.items():
        shared[part].copy_(tensor.detach())
