"""The cache of ``merge: soft``: keys and values, and the routing of the tokens so far.

Every layer stores each token's top-k, not running sums: a mean over any earlier tokens is then exact, after `crop` too.
That is a few numbers a token (under ``method: smear`` one an expert), against thousands of keys and values. The merged
experts of unfinished segments are stored until these end; rows with the same expert share it.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .soft_segments import History

Merged = tuple[Tensor, Tensor]
"""Gate and up, fused ``[experts, 2 * width, hidden]``, and down ``[experts, hidden, width]``."""


class LayerMemory:
    """The part of the cache that belongs to one MoE layer."""

    index: Tensor | None = None
    value: Tensor | None = None
    merged: Merged | None = None

    @property
    def columns(self) -> int:
        return 0 if self.index is None else self.index.shape[1]

    def extend(self, index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the experts and values of this pass's tokens, ``[batch, tokens, top_k]``; returns those of all."""
        index = index.to(torch.int16)
        if self.index is not None and self.value is not None:
            index, value = torch.cat([self.index, index], 1), torch.cat([self.value, value], 1)
        self.index, self.value = index, value
        return index, value

    def rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        if self.index is not None and self.value is not None:
            self.index, self.value = pick(self.index), pick(self.value)


class SoftCache(DynamicCache):
    """A `DynamicCache` that also holds the state of ``merge: soft``; both change together.

    `crop` is exact at any length: afterwards the model continues as if it had never processed the removed tokens.
    """

    history: History | None
    memories: defaultdict[int, LayerMemory]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forget()

    def forget(self) -> None:
        """Return to the state before the first token."""
        self.history, self.memories = None, defaultdict(LayerMemory)

    @property
    def routing_bytes(self) -> int:
        """Bytes of the state, beyond keys and values."""
        tensors = [t for each in self.memories.values() for t in (each.index, each.value, *(each.merged or ()))]
        if self.history is not None:
            tensors += [self.history.position, self.history.slot, self.history.since]
        return sum(t.nbytes for t in tensors if t is not None)

    def _rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        if self.history is not None:
            self.history = self.history.rows(pick)
        for memory in self.memories.values():
            memory.rows(pick)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.history is None or not tokens_to_remove:
            return
        columns = max(self.history.columns - abs(tokens_to_remove), 0)
        self.history = self.history.cropped(columns)
        for memory in self.memories.values():
            memory.rows(lambda t: t[:, :columns])

    def reset(self) -> None:
        super().reset()
        self.forget()


def soft_cache(cache: Cache) -> SoftCache:
    """`cache` itself, converted in place: `generate` and users create a plain cache and read it afterwards.

    Raises:
        TypeError: a cache of another class, which would change its rows and tokens without this state.
        ValueError: the cache holds tokens whose routing is not known.
    """
    if not isinstance(cache, SoftCache):
        if type(cache) is not DynamicCache:
            raise TypeError(
                f"found a {type(cache).__name__}; merge 'soft' keeps its routing in the cache and accepts a "
                "DynamicCache"
            )
        if cache.get_seq_length():
            raise ValueError(
                f"the cache holds {cache.get_seq_length()} tokens that no model with merge 'soft' has routed; "
                "accepted: an empty DynamicCache, or one that such a model has filled"
            )
        cache.__class__ = SoftCache
        cache.forget()
    routed = 0 if cache.history is None else cache.history.columns
    if routed != cache.get_seq_length():
        raise ValueError(
            f"the cache holds keys of {cache.get_seq_length()} tokens and the routing of {routed}: it was changed "
            "other than by its own methods, or a pass broke off"
        )
    return cache
