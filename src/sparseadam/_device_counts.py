"""Counters of a table that a device moves on, and what the host can know of them without waiting for it."""

from __future__ import annotations

from typing import Protocol

import torch


class Event(Protocol):
    """What of ``torch.cuda.Event`` is used."""

    def query(self) -> bool:
        """Whether all that was queued before it is done."""


class _Done:
    def query(self) -> bool:
        return True


class DeviceCounts:
    """Slots in use and rows skipped, counted where the moments are.

    Only memory has to know how many slots there are before a step is queued, and an upper bound does for it. After a
    step the counters are copied to the host without waiting; when the copy has arrived, the bound is what it says plus
    the lookups of the steps since, each of which may have been a new row's.

    Attributes:
        tensor: int64 ``[2]`` on the device, slots in use and rows skipped; steps add to it.
    """

    def __init__(self, num_slots: int, num_skipped: int, device: torch.device) -> None:
        """Start from what the host has counted."""
        self.tensor = torch.tensor((num_slots, num_skipped), dtype=torch.int64, device=device)
        self._arrived = torch.tensor(
            (num_slots, num_skipped), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda"
        )
        self._num_slots_known = num_slots
        self._lookups_since = 0
        self._copying: Event | None = None
        self._lookups_since_copy = 0

    def read(self) -> tuple[int, int]:
        """Return slots in use and rows skipped, having waited for the device."""
        num_slots, num_skipped = self.tensor.tolist()
        self._num_slots_known, self._lookups_since, self._copying = num_slots, 0, None
        return num_slots, num_skipped

    def most_slots(self) -> int:
        """Return a number of slots that are at most in use, without waiting."""
        if self._copying is not None and self._copying.query():
            self._num_slots_known, self._lookups_since = self._arrived.tolist()[0], self._lookups_since_copy
            self._copying = None
        return self._num_slots_known + self._lookups_since

    def note_step(self, num_lookups: int) -> None:
        """Take note of a step that was queued; it has added to ``tensor`` at most ``num_lookups`` slots."""
        self._lookups_since += num_lookups
        self._lookups_since_copy += num_lookups
        if self._copying is None:
            self._arrived.copy_(self.tensor, non_blocking=True)
            self._copying = _record(self.tensor.device)
            self._lookups_since_copy = 0


def _record(device: torch.device) -> Event:
    """Return an event after all that is queued on a device; on the CPU nothing is."""
    if device.type != "cuda":
        return _Done()
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
