"""The picture of moving base experts."""

import pytest
from convergence import picture

NAMEX = [[(10, 0.4), (20, 0.2)], [(10, 0.2), (20, 0.2)]]
MOMENTUM = [[(10, 0.6), (20, 0.1)]] * 2


def test_a_line_a_row_the_right_panel_over_the_first():
    found = picture({"NAMEx": NAMEX, "NAMEx-Mom": MOMENTUM}, 10)
    left, right = found.figure.axes
    plain, momentum = left.lines
    assert (plain.get_label(), momentum.get_label()) == ("NAMEx", "NAMEx-Mom")
    assert (plain.get_linestyle(), momentum.get_linestyle()) == ("-", "--")
    assert list(plain.get_xdata()) == [10, 20]
    assert list(plain.get_ydata()) == pytest.approx([0.3, 0.2])
    assert [list(line.get_ydata()) for line in right.lines] == [pytest.approx([1, 1]), pytest.approx([2, 0.5])]
    assert "10 steps apart" in found.line
    assert b"<svg" in found.svg()


def test_without_a_walk_there_is_nothing_to_draw():
    assert picture({}, 10) is None
