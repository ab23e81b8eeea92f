"""How many threads the arithmetic of a walk uses."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_less() -> Iterator[None]:
    """Leave a core to the thread that copies shards: torch's threads wait for each other, and would all wait for it.

    In memory, where nothing is copied, a walk is run so as well: sums are then split in the same way on both paths, and
    their results agree bit for bit.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
