"""Curvature of ``merge: soft``: the cost of a change of an expert's matrix on the tokens that the expert receives.

NAMEx eq. 9 with calibrated M_i, for one weight matrix and a segment's s:

    E^ = (sum_i s_i E_i c_i + l E_m C) (sum_i s_i c_i + l C)^-1,    l = 1 - sum_i s_i,    C = sum_i p_i c_i

where c_i is the second moment of the inputs of expert i in calibration text, per unit of its gate mass, and p_i its
share of that mass. This is the weighted least-squares mean of the experts, in which the base expert has the mass left
over (RegMean, Jin et al. 2023). A full c_i would need a system of the inputs' width for every segment. Here
``c_i = t_i (I + V_i V_i^T)`` with few columns in V_i, its leading directions. Without them this is a plain merge X of
the experts by ``s_i t_i``, and with them

    E^ = X + R (I + V^T V A)^-1 V^T,    R_i = s_i (E_i - E_m) V_i - a_i (X - E_m) V_i,    a_i = s_i + l p_i

(s, l and p multiplied by t and scaled to sum to 1 again), V all directions side by side and A the diagonal of a. Beyond
the plain merge, every segment and matrix costs as much as 2 * experts * rank tokens through the matrix, and a system of
experts * rank unknowns. Every pass also costs rank tokens through every expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init


class Directions(NamedTuple):
    """The c_i of the matrices with the same inputs."""

    leading: Tensor
    """V, ``[experts, columns, rank]``."""
    floor: Tensor
    """t, ``[experts]``; with `usage` as weights their mean is 1."""
    usage: Tensor
    """p, ``[experts]``, summing to 1."""


class CalibratedCurvature(nn.Module):
    """Measured statistics of the inputs of a layer's experts; not trainable. The forward returns them.

    A forward is needed for wrappers that move tensors to a device before it.
    """

    usage: Tensor
    input_floor: Tensor
    input_directions: Tensor
    neuron_floor: Tensor
    neuron_directions: Tensor

    def __init__(self, experts: int, hidden: int, width: int, rank: int):
        super().__init__()
        shapes = {
            "usage": (experts,),
            "input_floor": (experts,),
            "input_directions": (experts, hidden, rank),
            "neuron_floor": (experts,),
            "neuron_directions": (experts, width, rank),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set equal experts without directions: the identity. Tensors loaded from a checkpoint are not changed."""
        for name, tensor in self.named_buffers():
            init.constant_(tensor, 1 / len(tensor) if name == "usage" else float(name.endswith("floor")))

    def forward(self, like: Tensor) -> tuple[Directions, Directions]:
        """The directions of gate and up, and of down. Args: like, a tensor of the pass, which wrappers read."""
        return (
            Directions(self.input_directions, self.input_floor, self.usage),
            Directions(self.neuron_directions, self.neuron_floor, self.usage),
        )


def reweighted(shares: Tensor, rest: Tensor, directions: Directions) -> tuple[Tensor, Tensor, Tensor]:
    """s and l of the plain merge X, and the weights a.

    Args:
        shares: s, ``[groups, experts]``, at least float32.
        rest: l, ``[groups]``.
    """
    floor = directions.floor.to(shares)
    total = shares @ floor + rest
    shares, rest = shares * floor / total[:, None], rest / total
    return shares, rest, shares + torch.outer(rest, directions.usage.to(shares) * floor)


def correction(
    plain: Tensor,
    shares: Tensor,
    weight: Tensor,
    experts: Tensor,
    used: Tensor | None,
    base: Tensor | None,
    directions: Directions,
) -> Tensor:
    """``R (I + V^T V A)^-1 V^T``, ``[groups, rows, columns]``.

    Args:
        plain: X, of the same shape.
        shares: s, ``[groups, experts]``, at least float32.
        weight: a, shaped as `shares`.
        experts: E, ``[used experts, rows, columns]``.
        used: indices of the used experts; None: all.
        base: E_m, ``[rows, columns]``; None: zero.

    Memory: ``[groups, rows, experts * rank]`` in float32 three times.
    """
    leading = directions.leading.to(plain.dtype)
    count, columns, rank = leading.shape
    span = leading.transpose(0, 1).reshape(columns, count * rank)
    projected = experts @ (leading if used is None else leading[used])
    if base is not None:
        plain = plain - base
        of_base = (base @ span).view(len(base), count, rank).transpose(0, 1)
        projected = projected - (of_base if used is None else of_base[used])
    plain_projected = plain @ span
    weight = weight.repeat_interleave(rank, dim=1)[:, None]
    with torch.autocast(plain.device.type, enabled=False):
        wide = span.to(weight)
        system = torch.eye(len(wide.T)).to(weight) + (wide.T @ wide) * weight
        missing = torch.einsum("gn,nrk->grnk", shares if used is None else shares[:, used], projected.to(shares))
        if used is not None:
            padded = missing.new_zeros(*missing.shape[:2], count, rank)
            missing = padded.index_copy(2, used, missing)
        missing = missing.flatten(2) - plain_projected.to(weight) * weight
        # The parts of experts that share a strong direction cancel. In an orthonormal basis of the span they cancel in
        # this precision, so the large product can use the experts' dtype.
        basis, inside = torch.linalg.qr(wide)
        solved = torch.linalg.solve(system, missing, left=False) @ inside.T
    return solved.to(plain.dtype) @ basis.T.to(plain.dtype)
