"""The values of a picture lie where it draws them."""

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pictures need the extra 'report'")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from namex_hf.report.pictures import hover
from namex_hf.report.pictures.hover import Spot, spots
from namex_hf.report.pictures.picture import figure


def place_of(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """In per cent of the figure, from its left and its top."""
    across, up = axes.transData.transform((x, y)) / axes.get_figure().bbox.size
    return 100 * across, 100 - 100 * up


def middle_of(spot: Spot) -> tuple[float, float]:
    return spot.left + spot.width / 2, spot.top + spot.height / 2


@pytest.fixture
def drawn() -> Figure:
    return figure(3.0)


def test_a_mark_is_named_by_its_line_and_its_axis(drawn: Figure):
    axes = drawn.subplots()
    axes.plot([0.1, 1.1, 2], [0.5, float("nan"), 0.25], marker="o", label="experts merged")
    axes.plot([0, 2], [0.5, 0.25], label="without marks")
    axes.set_xlabel("layer")
    axes.set_xticks([0, 1, 2], ["4", "5", "6"])
    drawn.draw_without_rendering()
    first, last = spots(drawn)
    assert (first.text, last.text) == ("experts merged: layer 0, 0.5", "experts merged: layer 6, 0.25")
    assert middle_of(first) == pytest.approx(place_of(axes, 0.1, 0.5), abs=0.02)
    assert middle_of(last) == pytest.approx(place_of(axes, 2, 0.25), abs=0.02)


def test_an_unnamed_line_has_the_name_of_its_axis_and_a_hidden_one_its_own(drawn: Figure):
    axes = drawn.subplots()
    axes.set(xlabel="optimiser step", ylabel="loss,\nnats")
    axes.plot([1234.5], [2.0], marker="o")
    axes.plot([10], [3.0], marker="o", label="_of validation")
    axes.errorbar([20], [4.0], yerr=[1.0], marker="s", label="with bars")
    assert [spot.text for spot in spots(drawn)] == [
        "loss, nats: optimiser step 1234, 2",
        "of validation: optimiser step 10, 3",
        "with bars: optimiser step 20, 4",
    ]


def test_cells_are_named_by_their_column_s_title_and_blank_ones_are_not(drawn: Figure):
    upper, lower = drawn.subplots(2, 1, sharex=True)
    upper.set_title("gate")
    lower.set(xlabel="expert", ylabel="layer", yticks=range(2), yticklabels=["3", "7"])
    values = np.array([[0.5, np.nan], [0.25, 1.0]])
    upper.imshow(values[:1])
    lower.imshow(values)
    drawn.draw_without_rendering()
    found = spots(drawn)
    assert [spot.text for spot in found] == [
        "gate: expert 0, 0: 0.5",
        "gate: expert 0, layer 3: 0.5",
        "gate: expert 0, layer 7: 0.25",
        "gate: expert 1, layer 7: 1",
    ]
    assert middle_of(found[-1]) == pytest.approx(place_of(lower, 1, 1), abs=0.02)
    corner = place_of(lower, 0.5, 0.5)
    assert (found[-1].left, found[-1].top) == pytest.approx(corner, abs=0.02)


def test_bars_reach_from_zero_to_their_value(drawn: Figure):
    axes = drawn.subplots()
    axes.bar([-0.2, 0.8], [0.5, -0.25], 0.4, label="Nash")
    axes.set_xticks([0, 1], ["expert 4", "expert 9"])
    drawn.draw_without_rendering()
    up, down = spots(drawn)
    assert (up.text, down.text) == ("Nash: expert 4, 0.5", "Nash: expert 9, -0.25")
    assert up.top + up.height == pytest.approx(down.top, abs=0.02)
    assert (up.left, up.top) == pytest.approx(place_of(axes, -0.4, 0.5), abs=0.02)


def test_more_values_than_a_page_holds_are_none(drawn: Figure, monkeypatch: pytest.MonkeyPatch):
    drawn.subplots().plot(range(5), range(5), marker="o")
    assert len(spots(drawn)) == 5
    monkeypatch.setattr(hover, "MOST", 4)
    assert spots(drawn) == []
