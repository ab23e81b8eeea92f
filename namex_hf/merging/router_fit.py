"""The router's rows fitted to a layer's routed output, with the experts as they are.

For a token with the experts' answers O ``[K, hidden]``, gate values v ``[K]`` (zero beyond the top-k) and the output
wanted y, the squared error is ``|O^T v - y|^2 = v^T G v - 2 v^T b + |y|^2`` with ``G = O O^T`` and ``b = O y``. So the
experts are asked once, and no step of the fit runs them again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .experts import Expert
from .routing import Activation, answer

CHUNK_BYTES = 256 << 20  # of answers that are held at once
BATCH = 1024
CHECK_EVERY = 25
RATE = 0.05  # of Adam, relative to the root mean square of the rows' entries


@dataclass(frozen=True)
class Answers:
    """What is left of the experts' answers to the tokens of a fit.

    Memory: ``tokens * (K^2 + K + 1)`` numbers in float32.
    """

    gram: torch.Tensor  # G, [tokens, K, K]
    cross: torch.Tensor  # b, [tokens, K]
    energy: torch.Tensor  # |y|^2, [tokens]

    def weighted(self, weight: torch.Tensor) -> "Answers":
        """With errors times ``weight [tokens]``; in place."""
        square = weight.square()
        return Answers(
            self.gram.mul_(square[:, None, None]), self.cross.mul_(square[:, None]), self.energy.mul_(square)
        )

    def errors(self, gate: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Squared errors of ``tokens`` under gate values ``[n, K]``."""
        inner = (self.gram[tokens] @ gate[..., None])[..., 0] - 2 * self.cross[tokens]
        return (inner * gate).sum(-1) + self.energy[tokens]


def answers(
    inputs: torch.Tensor,
    wanted: torch.Tensor,
    experts: int,
    expert: Callable[[int], Expert],
    activation: Activation,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Answers:
    """Ask every expert about every token.

    Memory: beyond the result, `CHUNK_BYTES` of answers, one expert and its neurons.

    Args:
        advance: told of the tokens done.
    """
    count = len(inputs)
    gram = inputs.new_empty(count, experts, experts)
    cross = inputs.new_empty(count, experts)
    chunk = max(1, CHUNK_BYTES // (4 * experts * inputs.shape[1]))
    for start in range(0, count, chunk):
        rows = slice(start, start + chunk)
        given = torch.stack([answer(inputs[rows], expert(number), activation) for number in range(experts)], dim=1)
        torch.bmm(given, given.mT, out=gram[rows])
        cross[rows] = (given @ wanted[rows, :, None])[..., 0]
        advance(len(given))
    return Answers(gram, cross, wanted.square().sum(-1))


@dataclass(frozen=True)
class RouterFit:
    """The fitted rows and how they came about. Errors are relative to the energy of the output wanted."""

    router: torch.Tensor  # float32 [K, hidden]
    before: float  # on the tokens held out
    after: float
    steps: int  # after which the rows were kept


def gate_values(inputs: torch.Tensor, router: torch.Tensor, top_k: int, renormalises: bool) -> torch.Tensor:
    """Dense gate values ``[tokens, K]``, zero beyond the top-k; differentiable in the router."""
    value, index = (inputs @ router.T).softmax(-1).topk(top_k, dim=-1)
    if renormalises:
        value = value / value.sum(-1, keepdim=True)
    return torch.zeros(len(inputs), len(router), dtype=value.dtype, device=value.device).scatter(1, index, value)


def fit_router(
    inputs: torch.Tensor,
    known: Answers,
    router: torch.Tensor,
    top_k: int,
    renormalises: bool,
    held_out: torch.Tensor,
    steps: int,
    seed: int,
) -> RouterFit:
    """Adam on the squared error, cosine schedule; the rows that are best on the held-out tokens are kept.

    Deterministic: batches are drawn by a generator of their own.

    Args:
        inputs: float32 ``[tokens, hidden]``.
        router: ``[K, hidden]``, the start.
        held_out: bool ``[tokens]``.
    """
    rows = router.detach().float().clone().requires_grad_()
    fitted, checked = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    draw = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam([rows], lr=RATE * float(router.float().square().mean().sqrt()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))

    def missed(tokens: torch.Tensor) -> torch.Tensor:
        return known.errors(gate_values(inputs[tokens], rows, top_k, renormalises), tokens).sum()

    def energy(tokens: torch.Tensor) -> torch.Tensor:
        return known.energy[tokens].sum().clamp(min=torch.finfo(torch.float32).tiny)  # experts may be zero

    @torch.no_grad()
    def check() -> float:
        return float(torch.stack([missed(some) for some in checked.split(BATCH)]).sum() / energy(checked))

    before = after = check()
    best, kept_at = rows.detach().clone(), 0
    with torch.enable_grad():
        for step in range(1, steps + 1):
            batch = fitted[torch.randint(len(fitted), (BATCH,), generator=draw).to(fitted.device)]
            adam.zero_grad()
            (missed(batch) / energy(batch)).backward()
            adam.step()
            schedule.step()
            if (step % CHECK_EVERY == 0 or step == steps) and (now := check()) < after:
                best, after, kept_at = rows.detach().clone(), now, step
    return RouterFit(best, before, after, kept_at)
