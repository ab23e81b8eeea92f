"""The matrices of experts, and the sums over a layer's experts that games and merges need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..bargaining import CHUNK_BYTES, domain_gram
from ..bargaining.gram import chunks
from ..errors import NamexError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FIELDS = dict(zip(PROJECTIONS, ("gate", "up", "down"), strict=True))
FIELDS |= {f"{name}.bias": f"{field}_bias" for name, field in FIELDS.items()}
"""Fields of `ExpertWeights` by the names that files and records have for them."""

Matrices = torch.Tensor | Sequence[torch.Tensor]
"""One matrix an expert, stacked or listed; they are read in place, never copied as a whole."""
T = TypeVar("T", bound=Matrices)
T_co = TypeVar("T_co", bound=Matrices, covariant=True)


@dataclass(frozen=True, eq=False)
class ExpertWeights(Mapping[str, T_co]):
    """The matrices of one expert, or of all N experts of a layer; also a mapping, by the names that files have.

    One expert: gate and up ``[width, hidden]``, down ``[hidden, width]``, biases ``[rows]``. A layer: N of each.
    """

    gate: T_co | None  # None: the neurons are the activation of up alone
    up: T_co
    down: T_co
    gate_bias: T_co | None = None
    up_bias: T_co | None = None
    down_bias: T_co | None = None

    @classmethod
    def of(cls, make: Callable[[str], T], names: Iterable[str] = PROJECTIONS) -> ExpertWeights[T]:
        """What ``make`` gives for each name, one after the other."""
        fields: dict[str, Any] = {"gate": None, **{FIELDS[name]: make(name) for name in names}}
        return ExpertWeights(**fields)

    def __getitem__(self, name: str) -> T_co:
        value: T_co | None = getattr(self, FIELDS[name])
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name, field in FIELDS.items() if getattr(self, field) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def map(self, make: Callable[[T_co], T]) -> ExpertWeights[T]:
        return self.of(lambda name: make(self[name]), self)

    @property
    def count(self) -> int:
        """N, of a layer."""
        return len(self.up)

    @property
    def dtype(self) -> torch.dtype:
        """Of a layer's experts."""
        return next(iter(self.values()))[0].dtype

    def expert(self, number: int) -> Expert:
        """One expert of a layer: views."""
        return self.of(lambda name: self[name][number], self)

    def subset(self, numbers: Sequence[int]) -> Experts:
        """Some experts of a layer, listed: views."""
        return self.of(lambda name: [self[name][number] for number in numbers], self)

    def stacked(self, numbers: Sequence[int]) -> Expert:
        """Some experts of a layer, copied: ``[n, rows, columns]`` each."""
        return self.of(lambda name: torch.stack([self[name][number] for number in numbers]), self)

    def set_expert(self, number: int, expert: Expert) -> None:
        """Give a layer another expert, in place."""
        for name, matrix in expert.items():
            self[name][number].copy_(matrix)

    def to(self: Expert, like: torch.Tensor) -> Expert:
        """In the dtype of ``like``, and where it is."""
        return self.map(lambda matrix: matrix.to(like))

    def zeros(self) -> Expert:
        """Zeros in the shapes of one expert of a layer, in float32 on the CPU."""
        return self.of(lambda name: torch.zeros(self[name][0].shape), self)


Expert = ExpertWeights[torch.Tensor]
Experts = ExpertWeights[Matrices]


class NotFiniteError(NamexError):
    """An expert's matrix holds NaN or infinity. Callers that know the tensor's name add it."""

    def __init__(self, expert: int, projection: str):
        super().__init__(f"expert {expert}: {projection} holds NaN or infinite values; finite weights are needed")
        self.expert, self.projection = expert, projection


def games_of(granularity: str) -> tuple[tuple[str, ...], ...]:
    """The projections of each game: one game a matrix, or one for the whole expert."""
    return (PROJECTIONS,) if granularity == "expert" else tuple((name,) for name in PROJECTIONS)


def by_projection(values: torch.Tensor, granularity: str) -> dict[str, torch.Tensor]:
    """Of values ``[games, ...]`` the row of every projection's game."""
    return {name: values[index] for index, game in enumerate(games_of(granularity)) for name in game}


def each_projection(make: Callable[[str], torch.Tensor], names: Iterable[str] = PROJECTIONS) -> Expert:
    """``make`` of gate, up and down, a thread each: torch itself splits a chunk less well than three matrices."""
    with ThreadPoolExecutor(len(PROJECTIONS)) as pool:
        results = {name: pool.submit(make, name) for name in names}
        return ExpertWeights.of(lambda name: results[name].result(), results)


def grams(experts: Experts, base: Expert, granularity: str, device: str | torch.device = "cpu") -> torch.Tensor:
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
            return int(index)
    return int(suspects.nonzero()[0])


def weighted_sum(
    matrices: Matrices, weights: torch.Tensor, factor: float = 1.0, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """``factor * sum_i w_i E_i``, summed in float32 and rounded once, in the matrices' own dtype.

    With weights that sum to 1 this is ``E_m + sum_i w_i (E_i - E_m)``, whichever of them E_m is.

    Memory: one chunk of every matrix in float32 beyond the result.
    """
    shares = (weights * factor).to(device=device, dtype=torch.float32)[None]
    result = torch.empty_like(matrices[0].flatten())
    for columns, chunk in chunks(matrices, None, torch.float32, device):
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
    step, players = torch.zeros_like(base.flatten()), weights.nonzero().flatten().tolist()  # the others are not read
    if players:
        taken = matrices if len(players) == len(matrices) else [matrices[player] for player in players]
        shares = weights[players].to(device=device, dtype=base.dtype)
        for columns, tau in chunks(taken, base, base.dtype, device, chunk_bytes):
            step[columns] = torch.mv(tau.T, shares).to(step.device)
    return step.view_as(base)
