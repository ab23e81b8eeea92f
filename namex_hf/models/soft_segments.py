"""Which merged expert every token of a forward pass goes to: the bookkeeping of ``merge: soft``, one for all layers.

A segment is (document, position // length). Documents are told apart by their positions: one begins where a position
does not go on from the unpadded token before it. A run is the stretch of a row's unpadded tokens that share a segment;
a group is the set of a pass's tokens that share a merged expert.
"""

from typing import NamedTuple

import torch

AFTER_PROMPT = 1 << 40  # the segment of everything after the prompt, where the prompt alone routes


class History(NamedTuple):
    """What is known of the tokens in a cache; rows of the batch first."""

    position: torch.Tensor
    """``[batch, columns]``, -1 at padding."""
    slot: torch.Tensor
    """``[batch]``: which kept expert the row's latest run uses, -1 where none is kept. Rows may share one."""
    since: torch.Tensor
    """``[batch]``: the column at which that run began."""
    slots: int
    """How many experts every layer keeps."""
    prompt: int
    """Columns of the prompt: of the first pass, and of those that `generate` cuts a first pass into."""
    in_prompt: bool
    """Whether the latest pass was a part of such a cut, so that the next may go on with the prompt."""

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> "History":
        rows = torch.full((batch,), -1, device=device)
        return cls(rows.new_empty(batch, 0), rows, rows, 0, 0, True)

    @property
    def columns(self) -> int:
        return self.position.shape[1]

    def rows(self, pick) -> "History":
        """`pick` applied to every tensor that has a row a sequence."""
        return self._replace(position=pick(self.position), slot=pick(self.slot), since=pick(self.since))

    def cropped(self, columns: int) -> "History":
        """The first `columns`. A kept expert stays valid while a token of its run is left: its sources lie before."""
        return self._replace(
            position=self.position[:, :columns],
            slot=self.slot.masked_fill(self.since >= columns, -1),
            prompt=min(self.prompt, columns),
        )


class Segments(NamedTuple):
    """One pass: `carried` kept experts go on, `fresh` ones are made, tokens are laid out by group, carried first.

    No floating-point tensor is in it, so that mixed-precision wrappers, which cast what a layer is called with, leave
    it as it is.
    """

    past: int
    """Columns in the cache before this pass."""
    run: torch.Tensor
    """``[batch, columns]``: row * runs + run of every token up to now; batch * runs at padding."""
    sources: torch.Tensor
    """``[batch, runs, runs]``, boolean: whose tokens the routing of a run is averaged over."""
    total: torch.Tensor
    """``[batch, runs]``: how many tokens those are."""
    fresh: torch.Tensor
    """``[fresh groups]``: the row * runs + run of each."""
    carried: torch.Tensor | None
    """Kept experts that go on, by slot; None: all of them."""
    keep: torch.Tensor | None
    """Groups whose expert is kept for the next pass; None: all of them."""
    table: torch.Tensor
    """``[groups, most tokens]``: tokens of this pass by row * length + column; short groups repeat their first."""
    tokens: torch.Tensor
    """``[unpadded tokens]``: the same numbers, group after group."""
    place: torch.Tensor
    """``[unpadded tokens]``: where each of them stands in the flattened `table`."""

    def shares(self, index: torch.Tensor, value: torch.Tensor, experts: int, unrouted: float = 0.0) -> torch.Tensor:
        """s of every fresh group: the mean of its sources' top-k values, zeros elsewhere.

        Args:
            index: ``[batch, columns, top_k]``, the experts that each token up to now is routed to.
            value: what their router gives them.
            experts: their number.
            unrouted: s of every expert in a group that has no source.

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


class _Runs(NamedTuple):
    """Every token's segment, in full columns."""

    real: torch.Tensor
    document: torch.Tensor
    segment: torch.Tensor
    run: torch.Tensor
    latest: torch.Tensor
    since: torch.Tensor


def _find_runs(position: torch.Tensor, length: int, prompt: int | None) -> _Runs:
    """Args: position, ``[batch, columns]`` with -1 at padding; prompt, the columns before which segments count."""
    column = torch.arange(position.shape[1], device=position.device)
    real = position >= 0
    latest = torch.where(real, column, -1).cummax(1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)
    behind = before.clamp(min=0)
    step = position - position.gather(1, behind)
    # Padding in between may have been counted (positions by column) or not (positions by token).
    begins = real & ((before < 0) | (step < 1) | (step > column - before))
    segment = position // length
    if prompt is not None:
        segment = torch.where(real & (column >= prompt), AFTER_PROMPT, segment)
    starts = begins | (real & (segment != segment.gather(1, behind)))
    since = torch.where(starts, column, -1).amax(1)
    return _Runs(real, begins.cumsum(1) - 1, segment, starts.cumsum(1) - 1, latest[:, -1], since)


def _sources(found: _Runs, ident: torch.Tensor, runs: int, previous: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`Segments.sources` and `Segments.total`."""
    batch = len(ident)

    def of_run(values: torch.Tensor) -> torch.Tensor:
        spread = values.new_full((batch * runs + 1,), -2).scatter_(0, ident.flatten(), values.flatten())
        return spread[:-1].view(batch, runs)

    document, segment = of_run(found.document), of_run(found.segment)
    counts = ident.flatten().bincount(minlength=batch * runs + 1)[:-1].view(batch, 1, runs)
    own, other = segment[:, :, None], segment[:, None, :]
    in_span = other == own - 1 if previous else other < own
    sources = in_span & (document[:, :, None] == document[:, None, :]) & (counts > 0)
    return sources, torch.where(sources, counts, 0).sum(-1)


def _lay_out(group: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens by group: `table` over the positions in `group`, their order, and their places in the table."""
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
    real: torch.Tensor,
    position_ids: torch.Tensor | None,
    length: int,
    span: str,
    keep: bool,
    prefill: bool = False,
) -> tuple[Segments, History]:
    """Lay out one pass.

    Args:
        history: of the tokens before it.
        real: ``[batch, tokens]``, False at padding.
        position_ids: absolute; None: the unpadded tokens of a row are counted.
        length: of a segment.
        span: ``all``, ``previous`` or ``prompt``.
        keep: whether the experts of the rows' latest runs are kept for the pass to come.
        prefill: whether `generate` reads its prompt in this pass, or a part of it.

    Returns:
        The layout, and the history with this pass in it.
    """
    past, (batch, new) = history.columns, real.shape
    if position_ids is None:
        position_ids = (history.position >= 0).sum(1, keepdim=True) + real.cumsum(1) - 1
    position = torch.cat([history.position, torch.where(real, position_ids, -1)], 1)
    in_prompt = prefill and history.in_prompt
    prompt = past + new if in_prompt or not history.prompt else history.prompt
    found = _find_runs(position, length, prompt if span == "prompt" else None)
    runs = max(int(found.run.max()), 0) + 1
    row = torch.arange(batch, device=real.device)[:, None]
    ident = torch.where(found.real, row * runs + found.run, batch * runs)

    # Tokens that go on in a run whose expert is kept, and those that need one made.
    here, now = found.real[:, past:], ident[:, past:].contiguous()
    ongoing = torch.zeros_like(here)
    if past:
        ongoing = here & (history.slot >= 0)[:, None] & (found.run[:, past:] == found.run[:, past - 1 : past])
    fresh = now[here & ~ongoing].unique()
    expert = torch.where(ongoing, history.slot[:, None], history.slots + torch.searchsorted(fresh, now))
    used, group = expert[here].unique(return_inverse=True)
    carried = used[: len(used) - len(fresh)]
    table, order, place = _lay_out(group, len(used))
    tokens = here.flatten().nonzero()[:, 0]

    slot = torch.full_like(history.slot, -1)
    if keep:
        groups = torch.full_like(expert, -1).masked_scatter_(here, group)
        slot = groups.gather(1, (found.latest - past).clamp(min=0)[:, None])[:, 0]  # -1 in a row of padding
    kept, number = slot[slot >= 0].unique(return_inverse=True)
    slot = slot.masked_scatter(slot >= 0, number)

    sources = total = now.new_empty(0)
    if len(fresh):
        sources, total = _sources(found, ident, runs, span == "previous")
    segments = Segments(
        past,
        ident,
        sources,
        total,
        fresh,
        None if len(carried) == history.slots else carried,
        None if len(kept) == len(used) else kept,
        tokens[table],
        tokens[order],
        place,
    )
    return segments, History(position, slot, found.since, len(kept), prompt, in_prompt)


__all__ = ["History", "Segments", "plan_segments"]
