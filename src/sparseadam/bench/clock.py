"""Taking times: of the host, or of a device that works behind it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from time import perf_counter

import torch


def laps(device: torch.device, *parts: Callable[[], object]) -> list[float]:
    """Run parts one after the other and return the seconds that each took.

    On a CUDA or ROCm device they are taken between events there, from a device that has nothing to do to one that has
    done all, so that neither what the host queues nor what the device does is missing.
    """
    if device.type != "cpu":
        return _laps_of_device(device, parts)
    times = [perf_counter()]
    for part in parts:
        part()
        times.append(perf_counter())
    return [end - begin for begin, end in pairwise(times)]


def _laps_of_device(device: torch.device, parts: tuple[Callable[[], object], ...]) -> list[float]:
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in (None, *parts)]  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]
