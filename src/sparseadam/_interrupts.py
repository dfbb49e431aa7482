"""Holding back signals while a table is written in several goes: in between, rows and what is kept of them differ.

An interrupt would end a step there, and a handler that saves, as where a cluster takes a machine back, would save that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

try:
    # What CPython's signal wraps to give and take enums, which are most of its time: to hold one signal took 7.6 us
    # with them and 1.4 without, twice in a step of a small table that replays.
    import _signal as signal  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    import signal


# Those that programs answer in Python; not all of them are known everywhere.
# Ctrl-C comes last: to have it back, which ends programs, while others are still held would leave those unheard.
_NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGINT")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextmanager
def held() -> Iterator[None]:
    """Let signals that come meanwhile take effect afterwards, each once; may be nested."""
    came: dict[int, FrameType | None] = {}
    handlers = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        try:
            for number in handlers:
                signal.signal(number, came.setdefault)
        except ValueError:  # Python tells its main thread alone of signals: this one has nothing to hold back
            handlers = {}
        yield
    finally:
        try:
            _restore(list(handlers.items()))
        finally:
            if came:
                with ExitStack() as answers:  # all of them, even where one raises
                    for number, frame in came.items():
                        answers.callback(handlers[number], number, frame)


def _restore(handlers: list[tuple[int, Any]]) -> None:
    """Give signals their handlers back: all of them, even where one is answered at once and that raises."""
    if handlers:
        number, handler = handlers[0]
        try:
            signal.signal(number, handler)
        finally:
            if signal.getsignal(number) is not handler:  # signals are answered before this one's handler is exchanged
                signal.signal(number, handler)
            _restore(handlers[1:])
