"""Memory for moments that is paid for only where it is touched.

On the CPU the address space for every row of a table is reserved at once and the operating system commits a page when
it is first written. So moments never move and never have to be copied to grow, addresses stay valid, fresh memory is
zero, and what is resident is what was touched. Where that cannot be had (other devices, a refused reservation) the
moments grow by reallocation, one of the two at a time.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Smaller reservations come from the heap: a mapping has the size of whole pages, and their number is limited.
_MIN_MAPPING_BYTES = 1 << 20
# From this size on, moments are backed by huge pages where the system offers them on request.
_MIN_HUGE_PAGE_BYTES = 32 << 20
# Python names this flag only from 3.13 on; the value is that of Linux on x86-64 and arm64.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0

_GROWTH = 1.5


class MomentMemory(Protocol):
    """Slots of two moments and a row number each; slots in use come first, new ones are zero."""

    capacity: int

    def grow(self, num_slots: int) -> None:
        """Make room for at least ``num_slots`` slots; what is stored stays."""

    def moments(self, num_slots: int) -> tuple[Tensor, Tensor]:
        """Return ``exp_avg`` and ``exp_avg_sq`` of the first slots, each ``[num_slots, *row_shape]``."""

    def rows(self, num_slots: int) -> Tensor:
        """Return the row of each of the first slots, int64 ``[num_slots]``."""


class ReservedArray:
    """A zero-filled CPU array whose pages are committed as they are written."""

    def __init__(self, num_elements: int, dtype: torch.dtype, *, huge_pages: bool = False) -> None:
        """Reserve address space for ``num_elements``.

        Raises:
            OSError: the system refuses to reserve that much.
        """
        self._dtype = dtype
        self._buffer: mmap.mmap | bytearray
        num_bytes = num_elements * dtype.itemsize
        if num_bytes < _MIN_MAPPING_BYTES:
            self._buffer = bytearray(num_bytes)
            return
        if sys.platform == "win32":
            self._buffer = mmap.mmap(-1, num_bytes)
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._buffer = mmap.mmap(-1, num_bytes, flags=flags)
        if huge_pages and num_bytes >= _MIN_HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            self._buffer.madvise(mmap.MADV_HUGEPAGE)

    def first(self, shape: Sequence[int]) -> Tensor:
        """Return the array's beginning as a tensor of ``shape``, sharing its memory and keeping it alive.

        The tensor's storage ends where the tensor ends, so saving it does not save what is only reserved.
        """
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=self._dtype)
        return torch.frombuffer(self._buffer, dtype=self._dtype, count=count).view(tuple(shape))


class ReservedMemory:
    """Moments in reserved address space, the two of a slot side by side: one page walk finds both."""

    def __init__(self, num_rows: int, row_shape: Sequence[int], dtype: torch.dtype) -> None:
        """Reserve a slot for each of ``num_rows`` rows."""
        self.capacity = num_rows
        self._row_shape = tuple(row_shape)
        self._records = ReservedArray(2 * num_rows * math.prod(row_shape), dtype, huge_pages=True)
        self._rows = ReservedArray(num_rows, torch.int64)

    def grow(self, num_slots: int) -> None:
        """Do nothing: every slot that a table can need is reserved."""

    def moments(self, num_slots: int) -> tuple[Tensor, Tensor]:
        # Both are cut from one tensor: saved together, their storage is written once.
        records = self._records.first((num_slots, 2, *self._row_shape))
        return records[:, 0], records[:, 1]

    def rows(self, num_slots: int) -> Tensor:
        return self._rows.first((num_slots,))


class GrowingMemory:
    """Moments in ordinary tensors that are reallocated as they grow."""

    def __init__(self, num_rows: int, row_shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Start without slots; there will never be more than ``num_rows``."""
        self.capacity = 0
        self._num_rows = num_rows
        self._exp_avg = torch.zeros((0, *row_shape), dtype=dtype, device=device)
        self._exp_avg_sq = torch.zeros_like(self._exp_avg)
        self._rows = torch.zeros(0, dtype=torch.int64, device=device)

    def grow(self, num_slots: int) -> None:
        """Make room; at no time are there two copies of more than one of the two moments."""
        if num_slots <= self.capacity:
            return
        capacity = min(max(num_slots, int(self.capacity * _GROWTH)), self._num_rows)
        self._exp_avg = _enlarged(self._exp_avg, capacity)
        self._exp_avg_sq = _enlarged(self._exp_avg_sq, capacity)
        self._rows = _enlarged(self._rows, capacity)
        self.capacity = capacity

    def moments(self, num_slots: int) -> tuple[Tensor, Tensor]:
        return self._exp_avg[:num_slots], self._exp_avg_sq[:num_slots]

    def rows(self, num_slots: int) -> Tensor:
        return self._rows[:num_slots]


def _enlarged(tensor: Tensor, capacity: int) -> Tensor:
    larger = tensor.new_zeros((capacity, *tensor.shape[1:]))
    larger[: len(tensor)] = tensor
    return larger


def moment_memory(num_rows: int, row_shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> MomentMemory:
    """Return memory for the moments of a table: reserved where that can be had, else growing."""
    if device.type == "cpu":
        try:
            return ReservedMemory(num_rows, row_shape, dtype)
        except OSError:  # a limit on address space, or strict overcommit: grow by reallocation instead
            pass
    return GrowingMemory(num_rows, row_shape, dtype, device)


def zeros(num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a zero-filled vector, on the CPU committed as it is written where that can be had."""
    if device.type == "cpu":
        try:
            return ReservedArray(num_elements, dtype).first((num_elements,))
        except OSError:
            pass
    return torch.zeros(num_elements, dtype=dtype, device=device)
