"""The routed mass: the sum of a router's top-k values.

Where top-k values are not renormalised, their sum grows as experts become fewer; it is 1 for a single expert. The
output of the merged experts would then be larger than that of the originals. The ratio of the two sums corrects it.
"""

import torch

from .gate import Gate

DIRECTIONS = 2048


def expected_mass(
    router: torch.Tensor, norm: torch.Tensor, gate: Gate, seed: int, bias: torch.Tensor | None = None
) -> float:
    """Mean over random directions of the sum of a token's gate values.

    The router reads the output of an RMS norm: ``norm * u`` with ``u`` of unit mean square. Without data, ``u`` is
    taken from a normal distribution (seeded), which is what the norm makes of an isotropic residual stream.

    Args:
        router: ``[N, hidden]``.
        norm: ``[hidden]``, what the norm before the router multiplies by.
        bias: as `Gate` takes it.
    """
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(DIRECTIONS, router.shape[1], generator=draw) * norm.float()
    return float(gate(inputs @ router.float().T, bias)[0].sum(-1).mean())
