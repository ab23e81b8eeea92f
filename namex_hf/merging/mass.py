"""The routed mass: the sum of a router's top-k values.

Where top-k values are not renormalised, their sum grows as experts become fewer; it is 1 for a single expert. The
output of the merged experts would then be larger than that of the originals. The ratio of the two sums corrects it.
"""

import torch

DIRECTIONS = 2048


def expected_mass(router: torch.Tensor, norm: torch.Tensor, top_k: int, seed: int) -> float:
    """Mean over random directions of the sum of the top-k softmax values.

    The router reads the output of an RMS norm: ``norm * u`` with ``u`` of unit mean square. Without data, ``u`` is
    taken from a normal distribution (seeded), which is what the norm makes of an isotropic residual stream.

    Args:
        router: ``[N, hidden]``.
        norm: ``[hidden]``, the weight of the norm before the router.
    """
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(DIRECTIONS, router.shape[1], generator=draw) * norm.float()
    return float((inputs @ router.float().T).softmax(-1).topk(top_k, dim=-1).values.sum(-1).mean())
