"""Holding back signals while a table is written in several goes: in between, rows and what is kept of them differ.

An interrupt would end a step there, and a handler that saves, as where a cluster takes a machine back, would save that.
"""

from __future__ import annotations

from contextlib import ContextDecorator, ExitStack
from types import FrameType
from typing import Any

try:
    # What CPython's signal wraps to give and take enums, which are most of its time: to hold one signal took 7.6 us
    # with them and 1.4 without, twice in a step of a small table that replays and once before each read of it.
    import _signal as signal  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    import signal


# Those that programs answer in Python; not all of them are known everywhere.
# Ctrl-C comes last: to have it back, which ends programs, while others are still held would leave those unheard.
_NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGINT")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class held(ContextDecorator):  # named as contextlib's are; a generator would take 2.2 us where this takes 1.6
    """Let signals that come meanwhile take effect afterwards, each once; may be nested."""

    def __enter__(self) -> None:
        """Hold them back."""
        self._came: dict[int, FrameType | None] = {}
        self._handlers = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
        try:
            for number in self._handlers:
                signal.signal(number, self._came.setdefault)
        except ValueError:  # Python tells its main thread alone of signals: this one has nothing to hold back
            self._handlers = {}
        except BaseException:  # of one that was answered before it was held
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        """Give signals their handlers back, and call those of the ones that came."""
        try:
            _restore(list(self._handlers.items()))
        finally:
            if self._came:
                with ExitStack() as answers:  # all of them, even where one raises
                    for number, frame in self._came.items():
                        answers.callback(self._handlers[number], number, frame)

    def _recreate_cm(self) -> held:
        """Return another one for each call of what is decorated: it may call itself, and threads each other."""
        return held()


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
