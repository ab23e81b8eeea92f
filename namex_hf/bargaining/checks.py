"""What a bargain is given: checked, brought to float64, and scaled so that every player has length 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Game:
    """A batch of games between unit players.

    matrix: C [B, N, N], unit diagonal; linear: d / length [B, N]; power: [B, N], positive; present: [B, N], who plays;
    unscale: 1 / length [B, N]. Who does not play is at right angles to all others and has d = 0, p = 1.
    """

    matrix: Tensor
    linear: Tensor
    power: Tensor
    present: Tensor
    unscale: Tensor


def checked_game(gram: Tensor, disagreement: Tensor | None, power: Tensor | None) -> Game:
    """Check and scale the arguments of `nash_bargaining`. Raises ValueError: what was found, and what is accepted."""
    _check_gram(gram)
    count = gram.shape[-1]
    matrix = _double(gram).reshape(-1, count, count)
    linear = _vector("disagreement", disagreement, gram, default=0.0)
    weight = _vector("power", power, gram, default=1.0)
    if bool((weight < 0).any()):
        raise ValueError(f"power has a negative entry, {float(weight.min()):.3g}; accepted are powers >= 0")

    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    if bool((diagonal < 0).any()):
        raise ValueError(f"gram has a negative diagonal entry, {float(diagonal.min()):.3g}; squared lengths are >= 0")
    # Subnormal squared lengths have lost their digits, and 1 / length would overflow the weights.
    stake = diagonal >= torch.finfo(torch.float64).tiny
    unscale = torch.where(stake, diagonal.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    cosines = unscale[:, :, None] * matrix * unscale[:, None, :]
    _check_positive(matrix, cosines, stake, torch.finfo(gram.dtype).eps)

    present = stake & (weight > 0)
    both = present[:, :, None] & present[:, None, :]
    cosines = torch.where(both, (cosines + cosines.mT) / 2, 0.0)
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return Game(
        matrix=cosines,
        linear=torch.where(present, linear * unscale, 0.0),
        power=torch.where(present, weight, 1.0),
        present=present,
        unscale=unscale,
    )


def _double(tensor: Tensor) -> Tensor:
    # Apple's devices have no float64; the matrices are small enough to solve on the CPU.
    here = tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()
    return here.to(torch.float64)


def _check_gram(gram: Tensor) -> None:
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"gram has the shape {list(gram.shape)}; accepted is [..., N, N] with N >= 1")
    _check_numbers("gram", gram)


def _check_numbers(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has the dtype {tensor.dtype}; accepted are the floating dtypes")
    broken = int((~torch.isfinite(tensor)).sum())
    if broken:
        raise ValueError(f"{name} has {broken} entries that are NaN or infinite; all must be finite")


def _vector(name: str, vector: Tensor | None, gram: Tensor, default: float) -> Tensor:
    """[B, N] in float64, on the device where the game is solved."""
    wanted = gram.shape[:-1]
    device = _double(gram[..., :1, :1]).device
    if vector is None:
        return torch.full((wanted.numel() // wanted[-1], wanted[-1]), default, dtype=torch.float64, device=device)
    fits = 1 <= vector.dim() <= len(wanted) and vector.shape[-1] == wanted[-1]
    if not fits or any(a not in (1, b) for a, b in zip(reversed(vector.shape), reversed(wanted), strict=False)):
        raise ValueError(f"{name} has the shape {list(vector.shape)}; the gram asks for {list(wanted)}, or [N] for all")
    _check_numbers(name, vector)
    return _double(vector).to(device).expand(wanted).reshape(-1, wanted[-1])


def _check_positive(matrix: Tensor, cosines: Tensor, stake: Tensor, eps: float) -> None:
    """Gross errors only: rounding of the Gram matrix must pass, and what it does is for the tolerance to judge."""
    slack = max(1e-3, matrix.shape[-1] * eps)
    skew = float((cosines - cosines.mT).abs().amax()) if cosines.numel() else 0.0
    nobody = ~stake
    stray = (matrix.abs() * (nobody[:, :, None] | nobody[:, None, :])).amax() if matrix.numel() else 0.0
    if skew > slack or float(stray) > torch.finfo(torch.float32).tiny:
        what = f"by {skew:.3g} of the lengths" if skew > slack else f"or has {float(stray):.3g} beside a zero diagonal"
        raise ValueError(f"gram is not symmetric positive semidefinite: it is not symmetric {what}")
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    info = torch.linalg.cholesky_ex((cosines + cosines.mT) / 2 + (slack + nobody[:, :, None].double()) * eye).info
    if bool((info != 0).any()):
        game = int(info.ne(0).nonzero()[0])
        raise ValueError(f"gram is not positive semidefinite (game {game} of {len(matrix)}); accepted is K = G^T G")
