"""The picture of moving base experts."""

import pytest

from namex_hf.training.convergence import picture
from namex_hf.training.scratch import Schedule

SCHEDULE = Schedule(steps=40, warm_up=0, bargain_every=10)
STEPS = (10, 20, 30)


def falling(scale):
    """A distance in proportion to the learning rate."""
    return [(step, scale * SCHEDULE.learning_rate(step - 1)) for step in STEPS]


def test_a_line_a_row_the_right_panel_without_the_learning_rate():
    drifts = {"NAMEx": [falling(1.0), falling(3.0)], "NAMEx-Mom": [falling(5.0), falling(5.0)]}
    found = picture(drifts, SCHEDULE)
    left, right = found.figure.axes
    plain, momentum = left.lines
    assert (plain.get_label(), momentum.get_label()) == ("NAMEx", "NAMEx-Mom")
    assert (plain.get_linestyle(), momentum.get_linestyle()) == ("-", "--")
    assert list(plain.get_ydata()) == pytest.approx([value for _, value in falling(2.0)])
    assert [list(line.get_ydata()) for line in right.lines] == [pytest.approx([2.0] * 3), pytest.approx([5.0] * 3)]
    assert b"<svg" in found.svg()


def test_without_a_walk_there_is_nothing_to_draw():
    assert picture({}, SCHEDULE) is None
