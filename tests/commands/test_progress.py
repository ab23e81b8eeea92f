"""The time to go, and the lines of a run without a terminal, from events and a clock that the test sets."""

from collections.abc import Iterator

import pytest

from namex_hf.commands.patch_screen import Pace
from namex_hf.progress import FINISHED, ProgressEvent


def lefts(pace: Pace, events: list[ProgressEvent]) -> Iterator[float | None]:
    for event in events:
        pace.follow(event)
        yield pace.left


def finished(layer: int, **fields: int) -> ProgressEvent:
    return ProgressEvent(FINISHED, layer, **fields)


def test_layers_on_text_count_not_bytes() -> None:
    """Checking is quick and says nothing of layers; one that was resumed took no time of this process."""
    clock = iter((0.0, 2.0, 2.0, 4.0, 12.0, 16.0, 22.0))
    pace = Pace(4, 1000, clock.__next__)
    events = [
        ProgressEvent("checking", amount=500, done=500, total=1000),
        ProgressEvent(FINISHED, 0, amount=100, resumed=True),
        ProgressEvent("read", 1),
        finished(1, amount=100),  # 10 s
        ProgressEvent("read", 2),
        finished(2, amount=100),  # 10 s
    ]
    assert list(lefts(pace, events)) == [None, None, None, 20.0, 16.0, 10.0]
    assert pace.line(finished(2), each=True) == "layer 2: 10.0 s, 3 of 4 layers, 10 s to go"
    assert pace.line(finished(2), each=False) is None
    assert pace.line(ProgressEvent("read", 3), each=True) is None


def test_the_steps_of_a_fit_count() -> None:
    """5 s before the fit and 10 of 100 steps in 20 s: 205 s a layer, of which 25 are over, and a second layer."""
    clock = iter((0.0, 5.0, 25.0))
    pace = Pace(2, 1000, clock.__next__)
    events = [ProgressEvent("down", 0), ProgressEvent("fitted", 0, step=10, steps=100)]
    assert list(lefts(pace, events)) == [None, 2 * 205.0 - 25.0]


def test_bytes_count_without_text() -> None:
    """Those that this process has worked through: a quarter in 10 s beside a half that was there."""
    clock = iter((0.0, 0.0, 10.0))
    pace = Pace(4, 0, clock.__next__)
    events = [
        ProgressEvent("copying", amount=50, done=50, total=100, resumed=True),
        ProgressEvent("copying", amount=25, done=75, total=100),
    ]
    assert list(lefts(pace, events)) == [None, 10.0]


def test_much_to_come_is_announced_once() -> None:
    clock = iter((0.0, 100.0, 200.0))
    pace = Pace(3, 50_000, clock.__next__)
    said = []
    for layer in range(2):
        pace.follow(finished(layer))
        said.append(pace.line(finished(layer), each=False))
    assert said == ["layer 0: 100.0 s, 2.00 ms a token; about 3 min for the 2 layers to come", None]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (ProgressEvent("checking"), "checking"),
        (finished(3), "layer 3"),
        (ProgressEvent("read", 3), "layer 3: read"),
        (ProgressEvent("fitted", 3, step=50, steps=1000), "layer 3: fitted, step 50 of 1000"),
    ],
)
def test_an_event_in_words(event: ProgressEvent, words: str) -> None:
    assert str(event) == words
