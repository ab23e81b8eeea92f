"""The Nash bargain between experts over their losses, exactly: the game of `metric: calibrated`.

Player i is an expert with the matrix E_i and the second moment C_i of the inputs it sees. What a merged matrix W costs
it is the squared error of its outputs there (the loss of RegMean, Jin et al. 2023),

    l_i(W) = tr((W - E_i) C_i (W - E_i)^T).

Against a disagreement point W_0 the players maximise sum_i p_i log(l_i(W_0) - l_i(W)), Nash's product of gains with
powers p. Where all gain,

    W = (sum w_i E_i C_i) (sum w_i C_i)^-1,        w_i = p_i / (l_i(W_0) - l_i(W)),

so that W is RegMean with the players' own weights. `loss_dual` is the problem in w that is solved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from loss_dual import Dual, Optimum, minimise_dual
from torch import Tensor

from namex_hf.bargaining.existence import FLOOR_DOUBLE, FLOOR_SINGLE
from namex_hf.bargaining.nash import AGREEMENT, NO_AGREEMENT, WORST_RESIDUAL

#: Added to every player's moment, relative to the mean of its diagonal.
RIDGE = 1e-5


@dataclass(frozen=True)
class LossSolution:
    """Solution of one bargain over losses. Tensors are float64.

    weights: [N], w up to scale: they sum to the number of players in the game. 0 for players who are not in it, and for
        all without agreement.
    matrix: W, [rows, cols]; without agreement W_0.
    gains: [N], l_i(W_0) - l_i(W): positive for the players in the game; the others may lose. 0 without agreement.
    losses_before, losses_after: [N], l_i(W_0) and l_i(W), the ridge included. The latter to rounding of the former.
    residual: the certificate, r = max_i |w_i gain_i / p_i - 1| over the players in the game, w in its own scale and W
        before it is rounded: 0 at the solution alone. To second order no W has a larger sum p_i log gain_i by more than
        r^2 / 2 sum p_i. Rescaling players leaves it unchanged. 1 without agreement.
    iterations: Newton steps taken.
    status: 'agreement' or 'no_agreement'.
    """

    weights: Tensor
    matrix: Tensor
    gains: Tensor
    losses_before: Tensor
    losses_after: Tensor
    residual: float
    iterations: int
    status: str


def loss_bargaining(
    matrices: Sequence[Tensor] | Tensor,
    moments: Sequence[Tensor] | Tensor,
    disagreement: Tensor,
    power: Sequence[float] | Tensor | None = None,
    ridge: float = RIDGE,
    precision: torch.dtype | None = None,
) -> LossSolution:
    """Maximise sum_i p_i log(l_i(W_0) - l_i(W)) over W.

    Args:
        matrices: E_i, N of [rows, cols], any floating dtype.
        moments: C_i, N of [cols, cols], symmetric positive semidefinite, any floating dtype. A player's unit (tokens
            counted or averaged) does not change W.
        disagreement: W_0, [rows, cols].
        power: p >= 0, [N]; 1 by default. Only their ratios matter.
        ridge: every C_i is replaced by C_i + ridge mean(diag C_i) I, in the losses too, so that all that is said here
            holds of it exactly. In directions that nobody's inputs have, W is then the mean of the E_i, weighted. 0 is
            accepted where the sum of the moments is positive definite.
        precision: dtype that W_0 was kept in, by default its own: what it lost by that is nobody's gain.

    Out of the game, with weight 0 and without a veto, as in `nash_bargaining`: players of power 0, and players with no
    stake, whose loss at W_0 is 0: an expert that is W_0, or one with C_i = 0. Up to rounding that is a loss of at most
    eps^2 sum_j (C_i)_jj |W_0 e_j|^2 (W_0 rounded to `precision`) plus eps' sum_j (C_i)_jj |(E_i - W_0) e_j|^2 (C_i
    rounded to its dtype). The ridge is part of the loss: who is served perfectly by another matrix than its own on the
    few inputs it saw has a small stake, and a veto.

    No agreement exists exactly when W_0 is weakly Pareto optimal: when some v >= 0, v != 0 has
    sum v_i (E_i - W_0) C_i = 0. In floating point it is a proof that no W takes more from the loss of every player than
    c l_i(W_0) + eps^2 sum_j (C_i)_jj |W_0 e_j|^2, the latter as above, c 3.6e-12 for moments in float64 and 7.6e-6 else
    (the floors of `existence`). Also 'no_agreement': a residual above 1e-3.

    Computed in float64 on the disagreement point's device (on the CPU where the device has no float64), not
    differentiable; matrices and moments come there one at a time. Memory held beyond the arguments: the N products
    E_i C_i in float64, and about a dozen of [rows, cols] or [cols, cols]: 60 of [1408, 2048] take 1.4 GB and 0.4 GB.
    Moments summed in float32 over fewer tokens than columns have eigenvalues down to about -4e-6 of the mean diagonal:
    sum them in float64, or leave the ridge above that.

    Raises:
        ValueError: no players, shapes that do not fit, entries that are not finite, a moment that is not symmetric
            positive semidefinite, negative power or ridge, a precision that is not a floating dtype, moments whose sum
            is not positive definite with this ridge.
    """
    start = _checked_start(matrices, moments, disagreement, ridge)
    powers = _checked_power(power, len(matrices)).to(start.device)
    kept = disagreement.dtype if precision is None else precision
    if not isinstance(kept, torch.dtype) or not kept.is_floating_point:
        raise ValueError(f"precision is {kept!r}; accepted is a floating torch.dtype, such as torch.bfloat16")
    table = _Table.of(matrices, moments, start, powers, ridge, kept)
    optimum = table.bargain(powers) if table.playing else Optimum(None, 1.0, 0)
    point = optimum.point if optimum.residual <= WORST_RESIDUAL else None
    weights, gains, matrix = torch.zeros_like(table.before), torch.zeros_like(table.before), start.clone()
    if point is not None:
        matrix += point.move
        before = table.before[table.playing]
        unscaled = point.weights * (before.min() / before)
        weights[table.playing] = unscaled * (len(before) / unscaled.sum())
        gains[table.playing] = point.gains * before
        for index in set(range(len(matrices))) - set(table.playing):
            gains[index] = table.before[index] - table.loss(index, matrices[index], matrix)
    return LossSolution(
        weights=weights,
        matrix=matrix,
        gains=gains,
        losses_before=table.before,
        losses_after=(table.before - gains).clamp(min=0),
        residual=1.0 if point is None else optimum.residual,
        iterations=optimum.steps,
        status=NO_AGREEMENT if point is None else AGREEMENT,
    )


@dataclass(frozen=True)
class _Table:
    """The players as they sit down.

    moments: C_i as given; before: l_i(W_0) [N], ridge: what is added to the diagonal of C_i [N], rounding: what the
    rounding of W_0 does to l_i [N]; playing: who is in the game; pulls: (E_i - W_0) C_i / l_i(W_0) of those, in this
    order.
    """

    moments: list[Tensor]
    before: Tensor
    ridge: Tensor
    rounding: Tensor
    playing: list[int]
    pulls: Tensor

    @classmethod
    def of(
        cls,
        matrices: Sequence[Tensor] | Tensor,
        moments: Sequence[Tensor] | Tensor,
        start: Tensor,
        powers: Tensor,
        ridge: float,
        precision: torch.dtype,
    ) -> _Table:
        before, added, rounding = (torch.zeros_like(powers) for _ in range(3))
        pulls = start.new_empty(len(matrices), *start.shape)
        playing: list[int] = []
        for index in range(len(matrices)):
            moment = _checked_moment(moments[index], index, start)
            difference = _double(matrices[index], start.device) - start
            scale = moment.diagonal()
            pull = torch.matmul(difference, moment, out=pulls[len(playing)])
            added[index] = ridge * scale.mean()
            pull.add_(difference, alpha=float(added[index]))
            before[index] = (pull * difference).sum().clamp(min=0)
            rounding[index] = torch.finfo(precision).eps ** 2 * (start.square() @ scale).sum()
            blurred = torch.finfo(moments[index].dtype).eps * (difference.square() @ scale).sum()
            nothing = rounding[index] + blurred + torch.finfo(before.dtype).tiny
            if powers[index] > 0 and before[index] > nothing:
                pull.div_(before[index])
                playing.append(index)
        return cls([m.detach() for m in moments], before, added, rounding, playing, pulls[: len(playing)])

    def bargain(self, powers: Tensor) -> Optimum:
        """Every loss at the disagreement point becomes 1, so that no player's unit matters."""
        moments = [self.moments[index] for index in self.playing]
        before, power = self.before[self.playing], powers[self.playing]
        dual = Dual(moments, 1 / before, self.ridge[self.playing] / before, self.pulls, power / power.mean())
        floor = FLOOR_DOUBLE if all(moment.dtype == torch.float64 for moment in moments) else FLOOR_SINGLE
        return minimise_dual(dual, floor + self.rounding[self.playing] / before)

    def loss(self, index: int, own: Tensor, matrix: Tensor) -> Tensor:
        """l_i(W) of one player, by its definition."""
        difference = _double(own, matrix.device) - matrix
        seen = (difference @ _double(self.moments[index], matrix.device) * difference).sum()
        return seen + self.ridge[index] * difference.square().sum()


def _double(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A float64 tensor, on the device where the game is solved: Apple's have no float64."""
    where = device or tensor.device
    return tensor.detach().to("cpu" if where.type == "mps" else where).to(torch.float64)


def _checked_start(
    matrices: Sequence[Tensor] | Tensor, moments: Sequence[Tensor] | Tensor, disagreement: Tensor, ridge: float
) -> Tensor:
    """W_0 in float64. Checks all but the moments' entries."""
    if len(matrices) == 0 or len(moments) != len(matrices):
        raise ValueError(f"there are {len(matrices)} matrices and {len(moments)} moments; one each is needed")
    if disagreement.dim() != 2 or disagreement.numel() == 0:
        raise ValueError(f"disagreement has the shape {list(disagreement.shape)}; accepted is [rows, cols], not empty")
    columns = disagreement.shape[1]
    for index in range(len(matrices)):
        _check_tensor(f"matrix {index}", matrices[index], list(disagreement.shape))
        _check_tensor(f"moment {index}", moments[index], [columns, columns])
    _check_tensor("disagreement", disagreement, list(disagreement.shape))
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge is {ridge}; accepted are numbers >= 0")
    return _double(disagreement)


def _check_tensor(name: str, tensor: Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}; the disagreement point asks for {shape}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has the dtype {tensor.dtype}; accepted are the floating dtypes")
    broken = int((~torch.isfinite(_double(tensor))).sum())  # Not all the 8-bit formats know isfinite themselves.
    if broken:
        raise ValueError(f"{name} has {broken} entries that are NaN or infinite; all must be finite")


def _checked_moment(moment: Tensor, index: int, start: Tensor) -> Tensor:
    """C_i in float64, symmetric to the bit. Gross errors only are refused: rounding must pass."""
    given = _double(moment, start.device)
    even = (given + given.T) / 2
    slack = max(1e-3, len(given) * torch.finfo(moment.dtype).eps)
    skew = float((given - even).abs().amax())
    if skew > slack * float(given.abs().amax()):
        raise ValueError(f"moment {index} is not symmetric: entries differ from their mirror images by {2 * skew:.3g}")
    lifted = even.clone()
    lifted.diagonal().add_(slack * even.diagonal().mean())
    if bool(even.any()) and bool(torch.linalg.cholesky_ex(lifted).info):
        raise ValueError(f"moment {index} is not positive semidefinite; accepted is a sum of x x^T")
    return even


def _checked_power(power: Sequence[float] | Tensor | None, count: int) -> Tensor:
    if power is None:
        return torch.ones(count, dtype=torch.float64)
    given = torch.as_tensor(power).detach().cpu().double()
    if given.shape != (count,):
        raise ValueError(f"power has the shape {list(given.shape)}; {count} numbers are needed")
    if not bool(((given >= 0) & (given < math.inf)).all()):
        raise ValueError(f"power is {given.tolist()}; accepted are finite numbers >= 0")
    return given
