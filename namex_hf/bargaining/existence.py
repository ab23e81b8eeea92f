"""Whether an agreement exists: the test behind the status of a bargain, and its tolerance.

Players are vectors t_i of unit length with the Gram matrix C. An update x gives player i the gain t_i . x - d_i. An
agreement exists exactly when some x makes every gain positive. By Gordan's theorem that fails exactly when some v >= 0,
v != 0 has sum v_i t_i = 0 and d . v >= 0. For d = 0 this means that 0 lies in the convex hull of the players.

A general d is reduced to d = 0 by one more coordinate and one more player: t_i becomes (t_i, -d_i / R), and the extra
player is (0, 1). The hull of these N + 1 contains 0 exactly when such a v exists; its weight on the extra player is
d . v / R. The unit R is free. It is the largest |d_i|, but at least the natural gain of the game, sqrt(p), which
orthogonal unit players get for d = 0. So a d that is only rounding (K 1/N where the base is the mean) has no influence.

So one number decides: the squared length m of the shortest convex combination of the (lifted, unit) players. Every
b > 0 bounds it. From above, a witness against agreement: |sum v_i t_i|^2 for v = b / sum b. From below, a proof of
agreement: with x = sum b_i t_i, every w of the simplex has |sum w_i t_i| |x| >= sum w_i t_i . x >= min_i t_i . x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .newton import minimise

#: Squared lengths below these count as 0. float32: the rounding of products of 1e6 terms summed in float32, with a
#: margin (64 eps). float64: below this the bargain itself cannot be certified to better than about 1e-4 (2^14 eps).
FLOOR_SINGLE = 64 * torch.finfo(torch.float32).eps
FLOOR_DOUBLE = 2**14 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Tolerance:
    """A combination v of the simplex counts as zero when |sum v_i t_i|^2 <= max(floor, rounding sum v_i^2)."""

    floor: float
    rounding: float

    @property
    def largest(self) -> float:
        """The largest squared length that counts as zero, over all v."""
        return max(self.floor, self.rounding)

    @classmethod
    def of(cls, precision: torch.dtype, gram: torch.dtype) -> Tolerance:
        """From the dtype of the players' vectors and that of their Gram matrix.

        The floor covers the arithmetic of the Gram matrix: vectors of less than 64 bits are multiplied in float32. The
        other term covers the rounding of the players: independent errors of relative length eps, whose squares add up.
        A Gram matrix stored in 16 bits has errors of eps where it is large, on its diagonal. These add up to
        eps sum v_i^2 as well.
        """
        double = precision == torch.float64 and gram == torch.float64
        vectors, entries = torch.finfo(precision).eps, torch.finfo(gram).eps
        from_storage = 2 * entries if torch.finfo(gram).bits < 32 else 0.0
        return cls(floor=FLOOR_DOUBLE if double else FLOOR_SINGLE, rounding=max(vectors**2, from_storage))


@dataclass(frozen=True)
class Players:
    """The lifted unit players of a batch of games, by their Gram matrix. `present` [B, N] marks those in the game."""

    matrix: Tensor
    claim: Tensor
    present: Tensor
    unit: Tensor
    length: Tensor

    @classmethod
    def of(cls, matrix: Tensor, disagreement: Tensor, power: Tensor, present: Tensor) -> Players:
        """From C [B, N, N] of unit diagonal, d and p [B, N]. `unit` is R [B], 0 where d = 0 and nothing is lifted."""
        largest = disagreement.abs().amax(-1)
        natural = torch.where(present, power, 0.0).amax(-1).sqrt()
        unit = torch.where(largest > 0, torch.maximum(largest, natural), 0.0)
        claim = disagreement / torch.where(unit > 0, unit, 1.0)[:, None]
        return cls(matrix, claim, present, unit, (1 + claim * claim).sqrt())

    def witness(self, point: Tensor, image: Tensor, tolerance: Tolerance) -> Tensor:
        """Whether v = b / sum b counts as zero: bool [B], from b and C b [B, N]."""
        inside = torch.where(self.present, point, 0.0)
        extra = (self.claim * inside).sum(-1)
        missing = extra.clamp(max=0)
        weights = inside * self.length
        total = weights.sum(-1) + extra.clamp(min=0)
        squared = (inside * image).sum(-1) + missing * missing
        spread = (weights * weights).sum(-1) + extra.clamp(min=0) ** 2
        return squared <= torch.maximum(tolerance.floor * total * total, tolerance.rounding * spread)

    def proves_agreement(self, point: Tensor, image: Tensor, tolerance: Tolerance) -> Tensor:
        """Whether b > 0 proves an agreement that no combination counted as zero contradicts: bool [B]."""
        inside = torch.where(self.present, point, 0.0)
        gain = torch.where(self.present, (image - self.claim * self.unit[:, None]) / self.length, torch.inf).amin(-1)
        lifted = self.unit > 0
        margin = torch.where(lifted, torch.minimum(gain, self.unit), gain)
        squared = (inside * image).sum(-1).clamp(min=0) + self.unit**2
        return (margin > 0) & (margin * margin > tolerance.largest * squared)

    def lifted(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Gram matrix [b, N + 1, N + 1] and presence [b, N + 1] of the lifted unit players of the games `which` [B]."""
        claim, length, count = self.claim[which], self.length[which], self.matrix.shape[-1]
        matrix = self.matrix.new_zeros(len(claim), count + 1, count + 1)
        outer = claim[:, :, None] * claim[:, None, :]
        matrix[:, :count, :count] = (self.matrix[which] + outer) / length[:, :, None] / length[:, None, :]
        matrix[:, :count, count] = matrix[:, count, :count] = -claim / length
        matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        extra = (self.unit[which] > 0)[:, None]
        return matrix, torch.cat([self.present[which], extra], dim=-1)


def agreement_exists(players: Players, which: Tensor, tolerance: Tolerance) -> Tensor:
    """Decide the games `which` [B] that neither bound has decided; [b], True where an agreement exists.

    Minimises b . C b / 2 - sum b - p sum log b for a small power p. The minimiser, scaled to the simplex, is nearly the
    shortest combination: there C b = 1 + p / b, hence 1 / (S + N p) <= m <= (S + N p) / S^2 for S = sum b, and
    S + N p >= 1 since m <= 1. With N p = 0.05 this gives m within about a tenth; the tolerance needs only its order of
    magnitude. Where m = 0, b grows without bound along the combination that vanishes, until that is a witness.
    """
    matrix, present = players.lifted(which)
    count = matrix.shape[-1]
    ones = present.to(matrix)  # An absent player is orthogonal to the others, and has d = 0.
    power = torch.full_like(ones, 0.05 / count)
    undecided = Players.of(matrix, torch.zeros_like(ones), power, present)
    minimum = minimise(matrix, ones, power, lambda point, image: undecided.witness(point, image, tolerance))
    return ~minimum.stopped
