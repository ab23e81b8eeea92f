"""The router's rows fitted to a layer's target, with the experts as they are.

For a token with the expert outputs O ``[K, hidden]``, gate values v ``[K]`` (zero beyond the top-k) and the target y,
the squared error is ``|O^T v - y|^2 = v^T G v - 2 v^T b + |y|^2`` with ``G = O O^T`` and ``b = O y``. So every expert
runs once, and no step of the fit runs one again.
"""

from dataclasses import dataclass

import torch

from .gate import Gate
from .moe_layer import MoELayer
from .routing import expert_output, gate_values, on_tokens
from .settings import DEFAULTS, FitSettings


@dataclass(frozen=True)
class OutputProducts:
    """Inner products of expert outputs and target, for the tokens of a fit.

    Memory: ``tokens * (K^2 + K + 1)`` numbers in float32.
    """

    gram: torch.Tensor  # G, [tokens, K, K]
    cross: torch.Tensor  # b, [tokens, K]
    energy: torch.Tensor  # |y|^2, [tokens]

    def weighted(self, weight: torch.Tensor) -> "OutputProducts":
        """With errors times ``weight [tokens]``; in place."""
        square = weight.square()
        return OutputProducts(
            self.gram.mul_(square[:, None, None]), self.cross.mul_(square[:, None]), self.energy.mul_(square)
        )

    def errors(self, gate: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Squared errors of ``tokens`` under gate values ``[n, K]``."""
        inner = (self.gram[tokens] @ gate[..., None])[..., 0] - 2 * self.cross[tokens]
        return (inner * gate).sum(-1) + self.energy[tokens]


def output_products(
    inputs: torch.Tensor,
    target: torch.Tensor,
    layer: MoELayer,
    chunk_bytes: int = FitSettings.chunk_bytes,
) -> OutputProducts:
    """Run every expert of a layer on every token.

    Memory: beyond the result, ``chunk_bytes`` of outputs, one expert and its neurons.
    """
    count, experts = len(inputs), layer.experts.count
    gram = inputs.new_empty(count, experts, experts)
    cross = inputs.new_empty(count, experts)
    chunk = max(1, chunk_bytes // (4 * experts * inputs.shape[1]))
    for start in range(0, count, chunk):
        rows = slice(start, start + chunk)
        each = map(layer.experts.expert, range(experts))
        outputs = [on_tokens(expert_output, inputs[rows], expert, layer.activation) for expert in each]
        stacked = torch.stack(outputs, dim=1)
        torch.bmm(stacked, stacked.mT, out=gram[rows])
        cross[rows] = (stacked @ target[rows, :, None])[..., 0]
    return OutputProducts(gram, cross, target.square().sum(-1))


def products_memory(tokens: int, experts: int, settings: FitSettings = DEFAULTS) -> int:
    """Bytes that `output_products` holds for a fit of the rows of a router to a text of so many tokens."""
    return min(tokens, settings.router_tokens) * experts * (experts + 1) * 4 + settings.chunk_bytes


@dataclass(frozen=True)
class RouterProblem:
    """What the rows of a router are fitted to."""

    inputs: torch.Tensor  # float32 [tokens, hidden]
    products: OutputProducts
    held_out: torch.Tensor  # bool [tokens]
    gate: Gate
    settings: FitSettings = DEFAULTS
    bias: torch.Tensor | None = None  # of the gate, which stays as it is

    def error(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The sum of squared errors."""
        return self.products.errors(gate_values(self.inputs[tokens], rows, self.gate, self.bias), tokens).sum()

    def energy(self, tokens: torch.Tensor) -> torch.Tensor:
        """The sum of squares of the target."""
        return self.products.energy[tokens].sum().clamp(min=torch.finfo(torch.float32).tiny)  # experts may be zero

    @torch.no_grad()
    def held_out_error(self, rows: torch.Tensor) -> float:
        """Relative to the energy, on the tokens held out."""
        tokens = self.held_out.nonzero()[:, 0]
        errors = torch.stack([self.error(some, rows) for some in tokens.split(self.settings.batch)])
        return float(errors.sum() / self.energy(tokens))


@dataclass(frozen=True)
class RouterFit:
    """The fitted rows, and their errors relative to the energy of the target on the tokens held out."""

    router: torch.Tensor  # float32 [K, hidden]
    before: float
    after: float
    steps: int  # after which the rows were the best


def fit_router(problem: RouterProblem, router: torch.Tensor, steps: int, seed: int) -> RouterFit:
    """Adam on the squared error, cosine schedule; the rows that are best on the held-out tokens are returned.

    Deterministic: batches are drawn by a generator of their own.

    Args:
        router: ``[K, hidden]``, the start.
    """
    settings = problem.settings
    rows = router.detach().float().clone().requires_grad_()
    fitted = (~problem.held_out).nonzero()[:, 0]
    draw = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam([rows], lr=settings.router_rate * float(router.float().square().mean().sqrt()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
    before = after = problem.held_out_error(rows)
    best, best_at = rows.detach().clone(), 0
    with torch.enable_grad():
        for step in range(1, steps + 1):
            batch = fitted[torch.randint(len(fitted), (settings.batch,), generator=draw).to(fitted.device)]
            adam.zero_grad()
            (problem.error(batch, rows) / problem.energy(batch)).backward()
            adam.step()
            schedule.step()
            checks = step % settings.router_check_every == 0 or step == steps
            if checks and (error := problem.held_out_error(rows)) < after:
                best, after, best_at = rows.detach().clone(), error, step
    return RouterFit(best, before, after, best_at)
