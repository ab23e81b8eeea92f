"""The arguments of a bargain: checked, converted to float64, and scaled so that every player has length 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaledGames:
    """A batch of B games between N players of unit length.

    matrix: C [B, N, N], unit diagonal; linear: d / length [B, N]; power: [B, N], positive; present: bool [B, N], the
    players in the game; unscale: 1 / length [B, N]. An absent player is orthogonal to all others and has d = 0, p = 1.
    """

    matrix: Tensor
    linear: Tensor
    power: Tensor
    present: Tensor
    unscale: Tensor


def checked_game(gram: Tensor, disagreement: Tensor | None, power: Tensor | None) -> ScaledGames:
    """Check and scale the arguments of `nash_bargaining`. Raises ValueError with the wrong value and those accepted."""
    _check_gram(gram)
    count = gram.shape[-1]
    matrix = _to_double(gram).reshape(-1, count, count)
    linear = _vector("disagreement", disagreement, gram, default=0.0)
    weight = _vector("power", power, gram, default=1.0)
    if bool((weight < 0).any()):
        raise ValueError(f"power has a negative entry, {float(weight.min()):.3g}; accepted are powers >= 0")

    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    if bool((diagonal < 0).any()):
        raise ValueError(f"gram has a negative diagonal entry, {float(diagonal.min()):.3g}; squared lengths are >= 0")
    # Subnormal squared lengths have lost their digits, and 1 / length would overflow the weights.
    has_stake = diagonal >= torch.finfo(torch.float64).tiny
    unscale = torch.where(has_stake, diagonal.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    cosines = unscale[:, :, None] * matrix * unscale[:, None, :]
    _check_positive(matrix, cosines, has_stake, torch.finfo(gram.dtype).eps)

    present = has_stake & (weight > 0)
    both = present[:, :, None] & present[:, None, :]
    cosines = torch.where(both, (cosines + cosines.mT) / 2, 0.0)
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return ScaledGames(
        matrix=cosines,
        linear=torch.where(present, linear * unscale, 0.0),
        power=torch.where(present, weight, 1.0),
        present=present,
        unscale=unscale,
    )


def _to_double(tensor: Tensor) -> Tensor:
    # Apple's devices have no float64; the matrices are small enough to solve on the CPU.
    detached = tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()
    return detached.to(torch.float64)


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
    """`vector`, or `default` where it is None: float64 [B, N], on the device that solves the games."""
    shape = gram.shape[:-1]
    device = _to_double(gram[..., :1, :1]).device
    if vector is None:
        return torch.full((shape.numel() // shape[-1], shape[-1]), default, dtype=torch.float64, device=device)
    fits = 1 <= vector.dim() <= len(shape) and vector.shape[-1] == shape[-1]
    if not fits or any(a not in (1, b) for a, b in zip(reversed(vector.shape), reversed(shape), strict=False)):
        raise ValueError(f"{name} has the shape {list(vector.shape)}; the gram asks for {list(shape)}, or [N] for all")
    _check_numbers(name, vector)
    return _to_double(vector).to(device).expand(shape).reshape(-1, shape[-1])


def _check_positive(matrix: Tensor, cosines: Tensor, has_stake: Tensor, eps: float) -> None:
    """Refuse gross errors only: rounding of the Gram matrix must pass, and `Tolerance` judges its effect."""
    slack = max(1e-3, matrix.shape[-1] * eps)
    skew = float((cosines - cosines.mT).abs().amax()) if cosines.numel() else 0.0
    no_stake = ~has_stake
    stray = (matrix.abs() * (no_stake[:, :, None] | no_stake[:, None, :])).amax() if matrix.numel() else 0.0
    if skew > slack or float(stray) > torch.finfo(torch.float32).tiny:
        fault = f"by {skew:.3g} of the lengths" if skew > slack else f"or has {float(stray):.3g} beside a zero diagonal"
        raise ValueError(f"gram is not symmetric positive semidefinite: it is not symmetric {fault}")
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    info = torch.linalg.cholesky_ex((cosines + cosines.mT) / 2 + (slack + no_stake[:, :, None].double()) * eye).info
    if bool((info != 0).any()):
        game = int(info.ne(0).nonzero()[0])
        raise ValueError(f"gram is not positive semidefinite (game {game} of {len(matrix)}); accepted is K = G^T G")
