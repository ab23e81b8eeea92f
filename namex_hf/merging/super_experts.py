"""Experts on which a model depends out of all proportion to their tokens (Su et al. 2025).

Their outputs carry massive activations: a few entries that are many times as large as any other. They are never merged
or dropped, and the neurons that make these entries are never taken away.
"""

from torch import Tensor

MASSIVE = 10.0
"""How much larger than usual the largest output of a super expert is: the median of the layer's experts is usual."""


def super_experts(peaks: Tensor) -> list[int]:
    """Numbers of the super experts of a layer, the largest peak first.

    Args:
        peaks: ``[N]``, the largest entry of each expert's outputs on its tokens; 0 where an expert received none.
    """
    reached = peaks[peaks > 0]
    if not len(reached):
        return []
    order = peaks.argsort(descending=True).tolist()
    return [number for number in order if peaks[number] > MASSIVE * reached.median()]
