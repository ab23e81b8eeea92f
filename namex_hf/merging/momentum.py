"""Momentum of the base expert's propagation (Nguyen et al., eq. 11, Algorithm 2).

    mu <- beta mu + Delta,     E_m <- E_m + Re(gamma mu),     mu = 0 before the first layer

with a real step gamma. After complex momentum as Lorraine et al. 2022 have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch


def parts(beta: complex) -> tuple[str, ...]:
    """Which parts of mu there are: none without momentum, 'real' for a real beta, else 'real' and 'imag'."""
    if beta == 0:
        return ()
    return ("real", "imag") if beta.imag else ("real",)


def buffer_names(names: Iterable[str], beta: complex) -> tuple[str, ...]:
    """Names of the buffers beside a base of these names: 'momentum.real.gate_proj', 'momentum.imag.gate_proj'."""
    return tuple(buffer_name(part, name) for name in names for part in parts(beta))


def buffer_name(part: str, name: str) -> str:
    return f"momentum.{part}.{name}"


def momentum_step(
    base: Mapping[str, torch.Tensor],
    step: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    gamma: float,
    beta: complex,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """mu <- beta mu + Delta, E_m <- E_m + Re(gamma mu) (Nguyen et al., eq. 11); mu = Delta without momentum (eq. 9).

    Args:
        base: E_m of this layer by projection, float32.
        step: Delta of this layer, of the same names and shapes.
        buffers: second result of the layer before; empty at the first layer (mu = 0).
        gamma: the step size, real.
        beta: the coefficient; 0 for no momentum. That of a quaternion is b0 + i |(b1, b2, b3)|.

    Returns:
        The base of the next layer in the order of `base`, and the buffers to hand to its call:
        `buffer_names(base, beta)`. They share no memory, so a safetensors file can hold them as they are. The arguments
        are not changed.

    Memory held from layer to layer, in float32 copies of one expert: none without momentum, one for a real beta, two
    for a complex one or a quaternion. Within the call the old and the new ones, the next base, and one matrix.

    Raises:
        ValueError: steps or buffers that are not those of this base and momentum.
    """
    if set(step) != set(base):
        raise ValueError(f"steps are for {sorted(step)}; the base has {sorted(base)}")
    names = buffer_names(base, beta)
    if buffers and set(buffers) != set(names):
        raise ValueError(f"buffers are {sorted(buffers)}; accepted are {sorted(names)}, or none at the first layer")
    needed = parts(beta)
    next_base: dict[str, torch.Tensor] = {}
    next_buffers: dict[str, torch.Tensor] = {}
    for name in base:
        if not needed:
            next_base[name] = base[name] + gamma * step[name]
            continue
        old = {part: buffers[buffer_name(part, name)] for part in needed} if buffers else {}
        real = step[name] + beta.real * old["real"] if old else step[name].clone()
        if "imag" in needed:
            imaginary = torch.zeros_like(real)
            if old:
                real -= beta.imag * old["imag"]
                imaginary = beta.imag * old["real"] + beta.real * old["imag"]
            next_buffers[buffer_name("imag", name)] = imaginary
        next_buffers[buffer_name("real", name)] = real
        next_base[name] = base[name] + gamma * real
    return next_base, {name: next_buffers[name] for name in names}
