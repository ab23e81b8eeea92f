"""Rows, experts and shared expert of a layer with fewer experts, fitted together to the layer's target.

A local regression: no other layer takes part, so that its memory is that of one layer whatever the model.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..progress import ProgressCallback, ProgressEvent, no_progress
from .experts import Experts
from .gate import Gate
from .routing import Activation, expert_output, gate_values, shared_expert_output
from .settings import DEFAULTS, FitSettings


@dataclass(frozen=True)
class Problem:
    """What a layer is fitted to. Errors are weighted squares, relative to the energy of the target."""

    inputs: torch.Tensor  # float32 [tokens, hidden]
    target: torch.Tensor  # float32 [tokens, hidden], of all that is fitted
    weight: torch.Tensor  # [tokens], of errors
    held_out: torch.Tensor  # bool [tokens]
    gate: Gate
    activation: Activation
    settings: FitSettings = DEFAULTS
    bias: torch.Tensor | None = None  # of the gate, which stays as it is

    def energy(self, tokens: torch.Tensor) -> torch.Tensor:
        weighted = self.weight[tokens].square() * self.target[tokens].square().sum(1)
        return weighted.sum().clamp(min=torch.finfo(torch.float32).tiny)  # experts may be zero

    def missed(self, tokens: torch.Tensor, layer: "FitParameters") -> torch.Tensor:
        """The sum of weighted squares."""
        error = layer.output(self.inputs[tokens], self) - self.target[tokens]
        return (self.weight[tokens].square() * error.square().sum(1)).sum()

    @torch.no_grad()
    def error(self, tokens: torch.Tensor, layer: "FitParameters") -> float:
        missed = torch.stack([self.missed(some, layer) for some in tokens.split(self.settings.batch)]).sum()
        return float(missed / self.energy(tokens))


@dataclass(frozen=True)
class FitParameters:
    """The parameters of a fit, in float32: the experts' matrices, the router's rows, the shared expert."""

    experts: Experts
    router: torch.Tensor  # [K, hidden]
    shared: dict[str, torch.Tensor]  # as `shared_expert_output` takes it; empty: it is not fitted

    @classmethod
    def of(
        cls, experts: Experts, router: torch.Tensor, shared: Mapping[str, torch.Tensor], like: torch.Tensor
    ) -> "FitParameters":
        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(like, copy=True).requires_grad_()

        matrices = experts.map(lambda layer: [leaf(matrix) for matrix in layer])
        return cls(matrices, leaf(router), {part: leaf(tensor) for part, tensor in shared.items()})

    def parameters(self) -> list[torch.Tensor]:
        rows = [self.router] if len(self.router) > 1 else []  # one expert has all the mass whatever its row
        return [matrix for matrices in self.experts.values() for matrix in matrices] + rows + list(self.shared.values())

    def output(self, inputs: torch.Tensor, problem: Problem) -> torch.Tensor:
        """The layer's output ``[tokens, hidden]``, differentiable in everything."""
        gates = gate_values(inputs, self.router, problem.gate, problem.bias)
        shared = self.shared
        output = shared_expert_output(inputs, shared, problem.activation) if shared else torch.zeros_like(inputs)
        for number in range(len(self.router)):
            token = gates[:, number].nonzero()[:, 0]
            if len(token):
                expert_outputs = expert_output(inputs[token], self.experts.expert(number), problem.activation)
                output = output.index_add(0, token, gates[token, number, None] * expert_outputs)
        return output


@dataclass(frozen=True)
class LayerFit:
    """The result of a fit. Errors are relative to the energy of the target, on tokens held out."""

    before: float
    after: float
    steps: int  # after which the layer was the best
    tried: int  # steps in all


def fit_memory(
    hidden: int, width: int, shared: int, experts: int, active: int, tokens: int, settings: FitSettings = DEFAULTS
) -> int:
    """Bytes of `fit_layer`, and of answers of the shared expert, twice the text as hidden states.

    Args:
        width, shared: of a routed expert, and of the shared one.
        active: experts a token.
    """
    batch = settings.batch * (active * (4 * width + 3 * hidden) + 4 * shared + 3 * hidden)
    matrices = 2 * 3 * hidden * (experts * width + shared) + hidden * max(width, shared)
    return 4 * (matrices + batch + 2 * tokens * hidden)


def fit_layer(
    problem: Problem,
    experts: Experts,
    router: torch.Tensor,
    shared: Mapping[str, torch.Tensor],
    steps: int,
    seed: int,
    progress: ProgressCallback = no_progress,
) -> LayerFit:
    """Adafactor with a first moment (Shazeer & Stern 2018) on the squared error, cosine schedule, early stopping.

    The arguments end as the layer with the least error on the held-out tokens, which may be the start.
    Deterministic: batches are drawn by a generator of their own.

    Args:
        experts: K, in any floating dtype: the start; changed in place.
        router: ``[K, hidden]``: the start; changed in place.
        shared: as `shared_expert_output` takes it: the start; changed in place. Empty: the target is of the routed
            experts alone.
        progress: called after every check of the held-out tokens.

    Memory: parameters and first moments, each as large as ``experts`` and ``shared`` in float32 (second moments are
    a row and a column a matrix), the gradient of one matrix, and a batch of tokens through top-k experts and
    the shared one.
    """
    settings = problem.settings
    layer = FitParameters.of(experts, router, shared, problem.inputs)
    descent = Descent(layer.parameters(), steps, settings)
    fitted, checked = (~problem.held_out).nonzero()[:, 0], problem.held_out.nonzero()[:, 0]
    checked = checked[:: max(1, len(checked) // settings.checked_tokens)]
    batches = _batches(fitted, settings.batch, seed)
    before = best = problem.error(checked, layer)
    best_at, lowest, lowest_at, step = 0, math.inf, 0, 0
    with torch.enable_grad():
        while step < steps and step - lowest_at < max(settings.check_every, settings.patience * steps):
            step += 1
            batch = next(batches)
            descent.prepare(step)
            (problem.missed(batch, layer) / problem.energy(batch)).backward()
            if step % settings.check_every and step < steps:
                continue
            now = problem.error(checked, layer)
            progress(ProgressEvent("fitted", step=step, steps=steps))
            if now < lowest:
                lowest, lowest_at = now, step
            if now < best:
                best, best_at = now, step
                _copy(layer, experts, router, shared)
    descent.release()
    return LayerFit(before, best, best_at, step)


class Descent:
    """An optimiser that steps inside the backward pass, so that one matrix has a gradient at a time."""

    def __init__(self, parameters: list[torch.Tensor], steps: int, settings: FitSettings) -> None:
        from transformers.optimization import Adafactor  # which imports peft: seconds that only a fit needs

        self.steps, self.settings = steps, settings
        self.each = {
            parameter: Adafactor([parameter], lr=settings.rate, beta1=0.9, scale_parameter=True, relative_step=False)
            for parameter in parameters
        }
        self.hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in parameters]

    def release(self) -> None:
        """Remove the hooks: garbage collection does not find the cycle from a parameter through its hook and back."""
        for hook in self.hooks:
            hook.remove()

    def prepare(self, step: int) -> None:
        """Set the rate of a step, from 1 on."""
        settings = self.settings
        rate = settings.rate * min(1, step / settings.warm_up) * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))
        for one in self.each.values():
            one.param_groups[0]["lr"] = rate

    def _take(self, parameter: torch.Tensor) -> None:
        self.each[parameter].step()
        parameter.grad = None


def _batches(tokens: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches without end; every token once before one comes again, but for tails."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield from tokens[torch.randperm(len(tokens), generator=draw).to(tokens.device)].split(size)


def _copy(layer: FitParameters, experts: Experts, router: torch.Tensor, shared: Mapping[str, torch.Tensor]) -> None:
    for number in range(experts.count):
        experts.set_expert(number, layer.experts.expert(number).map(torch.Tensor.detach))
    router.copy_(layer.router.detach())
    for part, tensor in layer.shared.items():
        shared[part].copy_(tensor.detach())
