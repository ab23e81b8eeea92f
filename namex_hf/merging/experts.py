"""Tensors of a layer's experts, and the games that are played over them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ..bargaining import CHUNK_BYTES, domain_gram
from ..errors import NamexError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Matrices = torch.Tensor | Sequence[torch.Tensor]
"""One matrix an expert, stacked or not; they are read in place, never copied as a whole."""
Experts = Mapping[str, Matrices]
"""Routed experts by projection: N gates and ups of ``[width, hidden]``, N downs of ``[hidden, width]``."""
Base = Mapping[str, torch.Tensor]
"""The base expert by projection: in float32, unrounded, while it is propagated; in a group the member that it is."""


class NotFiniteError(NamexError):
    """An expert's matrix holds NaN or infinity; the caller, who knows names, says which tensor that is."""

    def __init__(self, expert: int, projection: str):
        super().__init__(f"expert {expert}: {projection} holds NaN or infinite values; finite weights are needed")
        self.expert, self.projection = expert, projection


def games_of(granularity: str) -> tuple[tuple[str, ...], ...]:
    """The projections that bargain together: one game a matrix, or one a whole expert."""
    return (PROJECTIONS,) if granularity == "expert" else tuple((name,) for name in PROJECTIONS)


def each_projection(make: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """``make`` of gate, up and down, side by side: torch's own threads split a chunk less well than three matrices."""
    with ThreadPoolExecutor(len(PROJECTIONS)) as pool:
        return dict(zip(PROJECTIONS, pool.map(make, PROJECTIONS), strict=True))


def grams(experts: Experts, base: Base, granularity: str, device: str | torch.device = "cpu") -> torch.Tensor:
    """Gram matrices of the domain vectors tau_i = E_i - E_m, one a game.

    Memory: no copy of the layer; a chunk of every expert in float32 at a time.

    Returns:
        float64 ``[games, N, N]`` on the CPU. The Gram matrix of a whole expert is the sum of its matrices' own.

    Raises:
        NotFiniteError: naming the first expert and projection with NaN or infinite values.
    """

    def of_projection(name: str) -> torch.Tensor:
        gram = domain_gram(experts[name], base[name], device=device).cpu()
        broken = ~gram.diagonal().isfinite()
        if broken.any():
            raise NotFiniteError(_first_not_finite(experts[name], broken), name)
        return gram

    of = each_projection(of_projection)
    return torch.stack([torch.stack([of[name] for name in game]).sum(0) for game in games_of(granularity)])


def _first_not_finite(matrices: Matrices, suspects: torch.Tensor) -> int:
    for index in suspects.nonzero().flatten().tolist():
        if not matrices[index].isfinite().all():
            return index
    return int(suspects.nonzero()[0])


def weighted_sum(
    matrices: Matrices, weights: torch.Tensor, factor: float = 1.0, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """``factor * sum_i w_i E_i``, summed in float32 and rounded once, in the matrices' own dtype.

    With weights that sum to 1 this is ``E_m + sum_i w_i (E_i - E_m)``, whichever of them E_m is.

    Memory: one chunk of every matrix in float32 beyond the result.
    """
    flat = [matrix.flatten() for matrix in matrices]
    result = torch.empty_like(flat[0])
    shares = (weights * factor).to(device=device, dtype=torch.float32)[None]
    width = max(1, CHUNK_BYTES // (4 * len(flat)))
    buffer = torch.empty(len(flat), min(width, len(result)), device=device)
    for start in range(0, len(result), width):
        columns = slice(start, start + width)
        chunk = buffer[:, : len(result[columns])]
        for row, vector in zip(chunk, flat, strict=True):
            row.copy_(vector[columns])
        result[columns] = torch.mm(shares, chunk)[0]
    return result.view_as(matrices[0])


def weighted_step(
    matrices: Matrices,
    base: torch.Tensor,
    weights: torch.Tensor,
    device: str | torch.device = "cpu",
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """``sum_i w_i (E_i - E_m)``, the update of NAMEx (paper eq. 6 and 9), in the base's dtype.

    Args:
        matrices: N of ``[rows, columns]``, in any floating dtype.
        base: ``[rows, columns]`` in float32, or float64.
        weights: ``[N]``.
        chunk_bytes: size of the working buffer.

    Memory: that buffer, a chunk of every expert, beyond the result.
    """
    players = weights.nonzero().flatten().tolist()  # those without weight are not read
    centre = base.flatten()
    step = torch.zeros_like(centre)
    if not players:
        return step.view_as(base)
    together = None
    if isinstance(matrices, torch.Tensor) and len(players) == len(matrices):
        together = matrices.flatten(1)  # one strided copy a chunk instead of one a player
    flat = [matrices[player].flatten() for player in players]
    shares = weights[players].to(device=device, dtype=base.dtype)
    width = max(1, chunk_bytes // (base.element_size() * len(players)))
    buffer = torch.empty(len(players), min(width, len(centre)), dtype=base.dtype, device=device)
    for start in range(0, len(centre), width):
        columns = slice(start, start + width)
        tau = buffer[:, : len(centre[columns])]
        if together is not None:
            tau.copy_(together[:, columns])
        else:
            for row, vector in zip(tau, flat, strict=True):
                row.copy_(vector[columns])
        tau.sub_(centre[columns].to(device))
        step[columns] = torch.mv(tau.T, shares).to(step.device)
    return step.view_as(base)
