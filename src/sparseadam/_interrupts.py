"""Holding back Ctrl-C while a table is written in several goes: in between, rows and what is kept of them differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

try:
    # What CPython's signal wraps to give and take enums, which are most of its time: to hold took 7.6 us with them and
    # takes 1.4 without, twice in a step of a small table that replays.
    import _signal as signal  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    import signal


@contextmanager
def held() -> Iterator[None]:
    """Let an interrupt that comes meanwhile take effect afterwards; may be nested."""
    came: list[tuple[int, FrameType | None]] = []
    handler = signal.getsignal(signal.SIGINT)
    is_held = callable(handler)
    if is_held:
        try:
            signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
        except ValueError:  # Python tells its main thread alone of signals: this one has nothing to hold back
            is_held = False
    try:
        yield
    finally:
        if is_held:
            signal.signal(signal.SIGINT, handler)
        if came and callable(handler):
            handler(*came[0])
