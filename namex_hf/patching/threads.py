"""How many threads the arithmetic uses."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..merging.experts import PROJECTIONS


@contextmanager
def shared_out() -> Iterator[None]:
    """Split torch's threads between the three matrices that are worked on side by side.

    The copy of shards and the writer have threads of their own. Threads of torch wait for each other at every
    operation, and would all wait for one that has lost its core. On both paths, over a checkpoint and in memory, so
    that sums are split in the same way and results agree bit for bit.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // len(PROJECTIONS)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
