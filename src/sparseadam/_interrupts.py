"""Holding back Ctrl-C while a table is written in several goes: in between, rows and what is kept of them differ."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
