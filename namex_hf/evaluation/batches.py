"""How many sequences go through a model at once, and which."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
MOST = 64
"""Sequences at once, as lm-eval's own upper bound; a CPU gains nothing beyond half of it."""
SHARE = 0.5
"""Of the free memory that a batch's logits may take: the other half is for everything else, and for the neighbours."""


def batches_of(
    items: Sequence[Item], size: int, order: Callable, same: Callable[[Item], Hashable]
) -> Iterator[list[Item]]:
    """Batches of `size` different sequences, in a fixed order: a function of the items alone.

    Args:
        order: sort key.
        same: items of which this is equal go through the model as one sequence; they must be neighbours in the order.
    """
    batch: list[Item] = []
    known: set[Hashable] = set()
    for item in sorted(items, key=order):
        if same(item) not in known and len(known) == size:
            yield batch
            batch, known = [], set()
        batch.append(item)
        known.add(same(item))
    if batch:
        yield batch


def fitting_batch(length: int, vocabulary: int, itemsize: int, free: int) -> int:
    """Sequences of `length` tokens whose logits fit into memory, by arithmetic: on a CPU a trial ends in a kill.

    The logits are there in the model's dtype and, as log-softmax and as its input, twice more in at most float32.

    Args:
        itemsize: bytes of a logit as the model gives it.
        free: bytes.
    """
    a_sequence = length * vocabulary * (itemsize + 8)
    return min(max(int(SHARE * free) // a_sequence, 1), MOST // 2)
