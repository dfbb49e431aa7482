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
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Smaller reservations come from the heap: a mapping has the size of whole pages, and their number is limited.
_MIN_MAPPING_BYTES = 1 << 20
# From this size on, moments are backed by huge pages where the system offers them on request.
_MIN_HUGE_PAGE_BYTES = 32 << 20
# Python names this flag only from 3.13 on; the value is that of Linux on x86-64 and arm64.
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0

_GROWTH = 1.5


class Part(NamedTuple):
    """One of the things kept for each slot.

    Parts of the same ``record`` have the same shape and dtype and lie side by side where the memory can do that: one
    page walk then finds them all.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    record: str


class SlotMemory(Protocol):
    """Slots of several parts; slots in use come first, new ones are zero."""

    capacity: int

    def grow(self, num_slots: int) -> None:
        """Make room for at least ``num_slots`` slots; what is stored stays."""

    def part(self, name: str, num_slots: int) -> Tensor:
        """Return a part of the first slots, ``[num_slots, *part.shape]``."""

    def all_parts(self, num_slots: int) -> dict[str, Tensor]:
        """Return all parts of the first slots; those of one record share a storage, which a file then holds once."""


class IndexedMemory(SlotMemory, Protocol):
    """Slots that come with memory for the index of the rows that have them."""

    @property
    def index(self) -> Tensor:
        """The index, ``index_dtype(num_rows)`` ``[num_rows]``."""


class SlotArray(Protocol):
    """Memory for one record of every slot."""

    def first(self, shape: Sequence[int]) -> Tensor:
        """Return its beginning as a tensor of ``shape`` that shares its memory and keeps it alive."""


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
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._buffer = mmap.mmap(-1, num_bytes, flags=flags)
        if huge_pages and num_bytes >= _MIN_HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            self._buffer.madvise(mmap.MADV_HUGEPAGE)

    def first(self, shape: Sequence[int]) -> Tensor:
        """Return the array's beginning as a tensor of ``shape``, sharing its memory and keeping it alive.

        The tensor's storage ends where the tensor ends, so saving it does not save what is only reserved.
        """
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=self._dtype, device="cpu")
        return torch.frombuffer(self._buffer, dtype=self._dtype, count=count).view(tuple(shape))


class ReservedMemory:
    """Slots in reserved address space, a slot for each row of the table."""

    def __init__(self, num_rows: int, parts: Mapping[str, Part]) -> None:
        """Reserve a slot for each of ``num_rows`` rows."""
        self.capacity = num_rows
        self._records: dict[str, SlotArray] = {}
        self._places: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for record in dict.fromkeys(part.record for part in parts.values()):
            names = [name for name, part in parts.items() if part.record == record]
            first = parts[names[0]]
            shape = (len(names), *first.shape)
            self._places.update((name, (record, shape, index)) for index, name in enumerate(names))
            self._records[record] = self._reserve(record, num_rows * math.prod(shape), first.dtype)

    def _reserve(self, record: str, num_elements: int, dtype: torch.dtype) -> SlotArray:
        return ReservedArray(num_elements, dtype, huge_pages=True)

    def grow(self, num_slots: int) -> None:
        """Do nothing: every slot that a table can need is reserved."""

    def part(self, name: str, num_slots: int) -> Tensor:
        record, shape, index = self._places[name]
        return self._records[record].first((num_slots, *shape))[:, index]

    def all_parts(self, num_slots: int) -> dict[str, Tensor]:
        shapes = {record: shape for record, shape, _ in self._places.values()}
        whole = {record: array.first((num_slots, *shapes[record])) for record, array in self._records.items()}
        return {name: whole[record][:, index] for name, (record, _, index) in self._places.items()}


class GrowingMemory:
    """Slots in ordinary tensors that are reallocated as they grow."""

    def __init__(self, num_rows: int, parts: Mapping[str, Part], device: torch.device) -> None:
        """Start without slots; there will never be more than ``num_rows``."""
        self.capacity = 0
        self._num_rows = num_rows
        self._parts = {
            name: torch.zeros((0, *part.shape), dtype=part.dtype, device=device) for name, part in parts.items()
        }

    def grow(self, num_slots: int) -> None:
        """Make room; at no time are there two copies of more than one part."""
        if num_slots <= self.capacity:
            return
        capacity = min(max(num_slots, int(self.capacity * _GROWTH)), self._num_rows)
        for name, tensor in self._parts.items():
            self._parts[name] = _enlarged(tensor, capacity)
        self.capacity = capacity

    def part(self, name: str, num_slots: int) -> Tensor:
        return self._parts[name][:num_slots]

    def all_parts(self, num_slots: int) -> dict[str, Tensor]:
        return {name: part[:num_slots] for name, part in self._parts.items()}


def _enlarged(tensor: Tensor, capacity: int) -> Tensor:
    larger = tensor.new_zeros((capacity, *tensor.shape[1:]))
    larger[: len(tensor)] = tensor
    return larger


def slot_memory(num_rows: int, parts: Mapping[str, Part], device: torch.device) -> SlotMemory:
    """Return memory for the slots of a table: reserved where that can be had, else growing."""
    if device.type == "cpu":
        try:
            return ReservedMemory(num_rows, parts)
        except OSError:  # a limit on address space, or strict overcommit: grow by reallocation instead
            pass
    return GrowingMemory(num_rows, parts, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left; PyTorch's for the CPU is a RuntimeError like others."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def in_stretches(act: Callable[[int, int], object], num_rows: int, at_once: int) -> None:
    """Have ``act(begin, end)`` go through rows some at a time: nothing is made that grows with a table.

    Where memory runs out they are fewer at a time: a call has changed nothing then, while those before have, and to
    begin all over would be once too often for them.
    """
    begin = 0
    while begin < num_rows:
        end = min(begin + at_once, num_rows)
        try:
            act(begin, end)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or end - begin == 1:
                raise
            at_once = (end - begin) // 2
        else:
            begin = end


def index_dtype(num_rows: int) -> torch.dtype:
    """Return the dtype of an index that holds slot + 1 of each row."""
    return torch.int32 if num_rows < 2**31 else torch.int64


def zeros(num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a zero-filled vector, on the CPU committed as it is written where that can be had."""
    if device.type == "cpu":
        try:
            return ReservedArray(num_elements, dtype).first((num_elements,))
        except OSError:
            pass
    return torch.zeros(num_elements, dtype=dtype, device=device)
