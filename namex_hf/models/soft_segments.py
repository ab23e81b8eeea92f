"""The merged expert of every token of a forward pass: the layout of ``merge: soft``, the same for all layers.

A segment is (document, position // length). Positions separate documents: a document begins where a position does not
continue that of the unpadded token before it. A run is the sequence of a row's unpadded tokens that share a segment. A
group is the set of a pass's tokens that share a merged expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor

AFTER_PROMPT = 1 << 40  # the segment of all tokens after the prompt, where the prompt alone routes


class History(NamedTuple):
    """The layout of the tokens in a cache; rows of the batch first."""

    position: Tensor
    """``[batch, columns]``, -1 at padding."""
    slot: Tensor
    """``[batch]``: the stored expert that the row's latest run uses, -1 without. Rows may share an expert."""
    since: Tensor
    """``[batch]``: the column at which that run began."""
    slots: int
    """Number of merged experts that every layer stores."""
    prompt: int
    """Columns of the prompt: of the first pass, or of all passes over which `generate` reads the prompt."""
    in_prompt: bool
    """Whether the latest pass read the prompt, so that the next pass may continue it."""

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> "History":
        rows = torch.full((batch,), -1, device=device)
        return cls(rows.new_empty(batch, 0), rows, rows, 0, 0, True)

    @property
    def columns(self) -> int:
        return self.position.shape[1]

    def rows(self, pick) -> "History":
        """`pick` applied to every tensor with a row for each sequence."""
        return self._replace(position=pick(self.position), slot=pick(self.slot), since=pick(self.since))

    def cropped(self, columns: int) -> "History":
        """The first `columns`. A stored expert is valid while a token of its run remains: its sources are earlier."""
        return self._replace(
            position=self.position[:, :columns],
            slot=self.slot.masked_fill(self.since >= columns, -1),
            prompt=min(self.prompt, columns),
        )


class Segments(NamedTuple):
    """The layout of a pass: `carried` groups use stored experts, `fresh` groups new ones; carried groups come first.

    It has no floating-point tensor: mixed-precision wrappers cast the arguments of a layer, and must not change it.
    """

    past: int
    """Columns in the cache before this pass."""
    run: Tensor
    """``[batch, columns]``: row * runs + run of every token so far; batch * runs at padding."""
    sources: Tensor
    """Boolean ``[batch, runs, runs]``: the runs over whose tokens the routing of a run is averaged."""
    total: Tensor
    """``[batch, runs]``: the number of those tokens."""
    fresh: Tensor
    """``[fresh groups]``: the row * runs + run of each."""
    carried: Tensor | None
    """Slots of the stored experts in use; None: all."""
    keep: Tensor | None
    """Groups whose expert is stored for the next pass; None: all."""
    table: Tensor
    """``[groups, longest group]``: tokens of this pass as row * length + column; short groups repeat their first."""
    tokens: Tensor
    """``[unpadded tokens]``: the same numbers, group after group."""
    place: Tensor
    """``[unpadded tokens]``: the place of each token in the flattened `table`."""

    def shares(self, index: Tensor, value: Tensor, experts: int, unrouted: float = 0.0) -> Tensor:
        """s of every fresh group: the mean of its sources' top-k values, zeros elsewhere.

        Args:
            index: ``[batch, columns, top_k]``, the experts of each token so far.
            value: their router values, shaped as `index`.
            experts: number of experts.
            unrouted: s of every expert in a group without sources.

        Returns:
            ``[fresh groups, experts]``, at least float32.
        """
        batch, runs, _ = self.sources.shape
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        places = (self.run[..., None] * experts + index.long()).flatten()
        sums = value.new_zeros((batch * runs + 1) * experts).scatter_add(0, places, value.flatten())
        by_run = sums[:-experts].view(batch, runs, experts)
        with torch.autocast(value.device.type, enabled=False):
            mean = (self.sources.to(value.dtype) @ by_run) / self.total.clamp(min=1)[..., None]
        mean = torch.where(self.total[..., None] > 0, mean, unrouted)
        return mean.view(batch * runs, experts)[self.fresh]


def _find_runs(position: Tensor, length: int, prompt: int | None) -> tuple[Tensor, ...]:
    """Document, segment and run of every token, ``[batch, columns]``; each row's latest token, and where its run began.

    Args:
        position: ``[batch, columns]``, -1 at padding.
        prompt: number of columns that have segments; None: all.
    """
    column = torch.arange(position.shape[1], device=position.device)
    real = position >= 0
    latest = torch.where(real, column, -1).cummax(1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)
    behind = before.clamp(min=0)
    step = position - position.gather(1, behind)
    # Positions may count padding in between (positions by column) or not (positions by token).
    begins = real & ((before < 0) | (step < 1) | (step > column - before))
    segment = position // length
    if prompt is not None:
        segment = torch.where(real & (column >= prompt), AFTER_PROMPT, segment)
    starts = begins | (real & (segment != segment.gather(1, behind)))
    since = torch.where(starts, column, -1).amax(1)
    return begins.cumsum(1) - 1, segment, starts.cumsum(1) - 1, latest[:, -1], since


def _sources(document: Tensor, segment: Tensor, ident: Tensor, runs: int, previous: bool) -> tuple[Tensor, Tensor]:
    """`Segments.sources` and `Segments.total`."""
    batch = len(ident)

    def of_run(values: Tensor) -> Tensor:
        spread = values.new_full((batch * runs + 1,), -2).scatter_(0, ident.flatten(), values.flatten())
        return spread[:-1].view(batch, runs)

    document, segment = of_run(document), of_run(segment)
    counts = ident.flatten().bincount(minlength=batch * runs + 1)[:-1].view(batch, 1, runs)
    target, source = segment[:, :, None], segment[:, None, :]
    in_span = source == target - 1 if previous else source < target
    sources = in_span & (document[:, :, None] == document[:, None, :]) & (counts > 0)
    return sources, torch.where(sources, counts, 0).sum(-1)


def _lay_out(group: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens by group: `table` of indices into `group`, their order, and their places in the table."""
    order = group.argsort(stable=True)
    sorted_group = group[order]
    counts = group.bincount(minlength=groups)
    first = counts.cumsum(0) - counts
    longest = int(counts.max()) if groups else 0
    place = sorted_group * longest + torch.arange(len(group), device=group.device) - first[sorted_group]
    table = order[first][:, None].repeat(1, longest)
    table.view(-1)[place] = order
    return table, order, place


def plan_segments(
    history: History,
    real: Tensor,
    position_ids: Tensor | None,
    length: int,
    span: str,
    keep: bool,
    prefill: bool = False,
) -> tuple[Segments, History]:
    """Lay out one pass.

    Args:
        history: of the tokens before this pass.
        real: ``[batch, tokens]``, False at padding.
        position_ids: absolute; None: the unpadded tokens of a row are counted.
        length: tokens of a segment.
        span: ``all``, ``previous`` or ``prompt``.
        keep: whether the experts of the rows' latest runs are stored for the next pass.
        prefill: whether `generate` reads its prompt, or a part of it, in this pass.

    Returns:
        The layout, and the history after this pass.
    """
    past, (batch, new) = history.columns, real.shape
    if position_ids is None:
        position_ids = (history.position >= 0).sum(1, keepdim=True) + real.cumsum(1) - 1
    position = torch.cat([history.position, torch.where(real, position_ids, -1)], 1)
    in_prompt = prefill and history.in_prompt
    prompt = past + new if in_prompt or not history.prompt else history.prompt
    document, segment, run, latest, since = _find_runs(position, length, prompt if span == "prompt" else None)
    runs = max(int(run.max()), 0) + 1
    row = torch.arange(batch, device=real.device)[:, None]
    ident = torch.where(position >= 0, row * runs + run, batch * runs)

    # Tokens that continue a run with a stored expert, and tokens that need a new expert.
    new_ident, ongoing = ident[:, past:].contiguous(), torch.zeros_like(real)
    if past:
        ongoing = real & (history.slot >= 0)[:, None] & (run[:, past:] == run[:, past - 1 : past])
    fresh = new_ident[real & ~ongoing].unique()
    expert = torch.where(ongoing, history.slot[:, None], history.slots + torch.searchsorted(fresh, new_ident))
    used, group = expert[real].unique(return_inverse=True)
    carried = used[: len(used) - len(fresh)]
    table, order, place = _lay_out(group, len(used))
    tokens = real.flatten().nonzero()[:, 0]

    slot = torch.full_like(history.slot, -1)
    if keep:
        groups = torch.full_like(expert, -1).masked_scatter_(real, group)
        slot = groups.gather(1, (latest - past).clamp(min=0)[:, None])[:, 0]  # -1 in a row of padding
    stored, number = slot[slot >= 0].unique(return_inverse=True)
    slot = slot.masked_scatter(slot >= 0, number)

    sources = total = new_ident.new_empty(0)
    if len(fresh):
        sources, total = _sources(document, segment, ident, runs, span == "previous")
    segments = Segments(
        past,
        ident,
        sources,
        total,
        fresh,
        None if len(carried) == history.slots else carried,
        None if len(stored) == len(used) else stored,
        tokens[table],
        tokens[order],
        place,
    )
    return segments, History(position, slot, since, len(stored), prompt, in_prompt)
