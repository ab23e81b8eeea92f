"""The bookkeeping of ``merge: soft`` alone: where segments and documents begin, and what a cache knows of them."""

import pytest
import torch

from namex_hf.models.soft_segments import History, plan_segments


def plan(positions, mask=None, span="all", history=None, length=4, keep=True):
    """Of one row, or of several."""
    positions = torch.tensor(positions if isinstance(positions[0], list) else [positions])
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else torch.tensor(mask).view_as(positions) == 1
    if history is None:
        history = History.empty(len(positions), positions.device)
    return plan_segments(history, real, positions, length, span, keep)


def sources(segments) -> list[list[int]]:
    """Runs that each run of the first row is routed by."""
    return [row.nonzero()[:, 0].tolist() for row in segments.sources[0]]


@pytest.mark.parametrize(
    ("positions", "mask", "runs", "expected"),
    [
        ([0, 1, 2, 3, 4, 5, 8, 9], None, [0, 0, 0, 0, 1, 1, 2, 2], [[], [0], []]),  # a jump: another document
        ([0, 1, 2, 3, 4, 0, 8, 9], [1, 1, 1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, -1, 2, 2], [[], [0], []]),
        ([0, 1, 2, 3, 4, 5, 6, 7], [1, 1, 0, 0, 1, 1, 1, 1], [0, 0, -1, -1, 1, 1, 1, 1], [[], [0]]),  # by column
        ([0, 1, 0, 0, 2, 3, 4, 5], [1, 1, 0, 0, 1, 1, 1, 1], [0, 0, -1, -1, 0, 0, 1, 1], [[], [0]]),  # by token
        ([0, 1, 2, 3, 4, 0, 1, 2], None, [0, 0, 0, 0, 1, 2, 2, 2], [[], [0], []]),  # packed
        ([0, 0, 0, 1, 2, 0, 1, 0], None, [0, 1, 2, 2, 2, 3, 3, 4], [[], [], [], [], []]),
        ([5, 5, 5, 6, 7, 8, 9, 9], [0, 0, 1, 1, 1, 1, 1, 0], [-1, -1, 0, 0, 0, 1, 1, -1], [[], [0]]),
        ([6, 7, 8, 9, 10, 11, 12, 13], None, [0, 0, 1, 1, 1, 1, 2, 2], [[], [0], [0, 1]]),  # boundaries are absolute
    ],
)
def test_where_runs_begin(positions, mask, runs, expected):
    segments, _ = plan(positions, mask)
    number = len(expected)
    assert [r if r < number else -1 for r in segments.run[0].tolist()] == runs
    assert sources(segments) == expected


def test_spans():
    positions = list(range(11))
    assert sources(plan(positions)[0]) == [[], [0], [0, 1]]
    assert sources(plan(positions, span="previous")[0]) == [[], [0], [1]]
    _, history = plan(positions[:6], span="prompt")
    after, _ = plan(positions[6:], span="prompt", history=history)
    assert after.run[0].tolist() == [0] * 4 + [1] * 2 + [2] * 5
    assert sources(after)[2] == [0, 1]
    assert after.total[0].tolist() == [0, 4, 6]


def test_nothing_right_before_a_segment_means_the_base():
    """Under `previous`, where padding fills the segment before: no source, total 0."""
    segments, _ = plan(list(range(12)), [1] * 4 + [0] * 4 + [1] * 4, span="previous")
    assert sources(segments) == [[], []]
    index, value = torch.zeros(1, 12, 1, dtype=torch.long), torch.ones(1, 12, 1)
    assert segments.shares(index, value, 3).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_padding_counts_for_nothing():
    segments, _ = plan(list(range(8)), [1, 1, 0, 1, 1, 1, 1, 1])
    index = torch.tensor([[[0], [1], [2], [1], [2], [2], [2], [2]]])
    value = torch.full((1, 8, 1), 0.6)
    value[0, 2] = torch.nan
    shares = segments.shares(index, value, 3)
    assert shares[0].tolist() == [0, 0, 0]
    assert shares[1].tolist() == pytest.approx([0.2, 0.4, 0])


def test_tokens_are_laid_out_by_group():
    segments, _ = plan([[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]], [[1] * 6, [0, 0, 0, 1, 1, 1]])
    assert segments.table.tolist() == [[0, 1, 2, 3], [4, 5, 4, 4], [9, 10, 11, 9]]
    assert segments.tokens.tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert segments.table.flatten()[segments.place].tolist() == segments.tokens.tolist()
    assert segments.keep.tolist() == [1, 2]  # the experts in progress, a row each


def test_what_is_kept_and_made():
    _, history = plan([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    assert (history.slots, history.slot.tolist(), history.since.tolist()) == (2, [0, 1], [4, 4])
    inside, _ = plan([[5, 6], [5, 6]], history=history)
    assert len(inside.fresh) == 0
    assert inside.carried is inside.keep is None
    across, after = plan([[5, 6, 7, 8], [5, 6, 7, 0]], history=history)  # row 1 begins a document
    assert len(across.fresh) == 2
    assert across.keep.tolist() == [2, 3]
    assert after.slot.tolist() == [0, 1]
    shared = history.rows(lambda t: t[[1, 1]])
    assert plan([[5], [5]], history=shared)[0].carried.tolist() == [1]
    assert len(plan([[5], [5]], history=history.cropped(4))[0].fresh) == 2
    _, nothing = plan([[0, 1], [0, 1]], keep=False)
    assert (nothing.slots, nothing.slot.tolist()) == (0, [-1, -1])


def test_a_layout_holds_no_floats():
    """Wrappers for mixed precision cast the floating-point tensors that a layer is called with."""
    segments, _ = plan(list(range(9)))
    assert not any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in segments)
