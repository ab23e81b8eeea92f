"""A limit on the time that a program of others may take: a chat template is one, and can loop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import NamexError

SECONDS = 10.0
"""For one chat, which takes milliseconds."""


@contextmanager
def limited(what: str, raises: type[NamexError], seconds: float | None = None) -> Iterator[None]:
    """End the block when the time by the clock is over.

    Relies on SIGALRM, which Python handles between two steps of its own: a template is compiled to such steps. Only the
    main thread of a process can be stopped so; in others, and where SIGALRM is in use or missing, the block has no
    limit.

    Args:
        what: runs in the block; named in the message.
        seconds: default: `SECONDS`.

    Raises:
        NamexError: of the kind ``raises``: it took longer.
    """
    limit = SECONDS if seconds is None else seconds
    in_use = not hasattr(signal, "SIGALRM") or signal.getitimer(signal.ITIMER_REAL)[0] > 0
    if in_use or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise raises(f"{what} takes longer than {limit:g} s; accepted: one that ends")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
