"""Files that are mapped into memory whole, and what is told of their records bit by bit.

The operating system reads a page of the file when it is first looked at and writes it back when it needs the memory, so
neither grows with the file. What is stored stays when the process is killed, in the order of the stores, because it is
the system's page that was written. Three things do not come by themselves: a store to a page for which the disk has no
block left ends the process (SIGBUS), so blocks are allocated before, by a call that can fail; two processes that map a
file do not notice each other, so it is locked; and only ``sync()`` says that the disk has what memory has.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import _validate
from ._memory import MAP_NORESERVE, ReservedArray

# Pages that had to be waited for after which reading ahead is tried again.
_FAULTS_WAITED_FOR = 16

_READ_ONE_PAGE = getattr(mmap, "MADV_RANDOM", None)


class MappedFile(mmap.mmap):
    """A file of fixed size, mapped shared. Tensors made of it keep it alive; with the last one it is unmapped.

    It holds no tensor of its own memory: that would keep it alive for ever.
    """

    path: str
    fd: int
    _is_allocated: Tensor
    _faults_seen: int | None

    def __new__(cls, path: str, fd: int, num_bytes: int) -> MappedFile:
        """Map an open file.

        Raises:
            OSError: the system refuses so large a mapping.
        """
        try:
            flags = mmap.MAP_SHARED | MAP_NORESERVE
            self = super().__new__(cls, fd, num_bytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, OverflowError) as error:
            raise _validate.file_error(path, f"could not be mapped ({num_bytes} bytes)", error) from None
        self.path = path
        # Its own, which lasts as long as the mapping and goes with it.
        self.fd = os.dup(fd)
        weakref.finalize(self, os.close, self.fd)
        if _READ_ONE_PAGE is not None:  # the rows of a batch are scattered: pages around them are read for nothing
            self.madvise(_READ_ONE_PAGE)
        # A byte for each page. What was allocated before the file was opened is allocated again, which changes nothing.
        self._faults_seen = 0
        num_pages = -(-num_bytes // mmap.PAGESIZE)
        self._is_allocated = ReservedArray(num_pages, torch.uint8).first((num_pages,))
        return self

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a part of the file as a tensor, whose storage ends where the tensor ends."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        return torch.frombuffer(self, dtype=dtype, count=count, offset=offset).view(tuple(shape))

    def prefetch(self, begins: Tensor, num_bytes: int) -> None:
        """Have the system read the pages of records that are about to be looked at, many at a time.

        One after the other, as they are looked at, takes several times as long. Where everything is in memory it is for
        nothing, so it is left out after a call that read nothing, until pages had to be waited for again.

        Args:
            begins: where each record begins, int64 ``[num_records]``, in any order and with repeats.
            num_bytes: of each record.
        """
        import resource  # where there is none, check_platform has refused before

        before = resource.getrusage(resource.RUSAGE_SELF)
        if self._faults_seen is not None and before.ru_majflt < self._faults_seen + _FAULTS_WAITED_FOR:
            return
        for begin, end in _runs(torch.unique(self._pages(begins, num_bytes))):
            size = (end - begin) * mmap.PAGESIZE
            os.posix_fadvise(self.fd, begin * mmap.PAGESIZE, size, os.POSIX_FADV_WILLNEED)
        after = resource.getrusage(resource.RUSAGE_SELF)
        self._faults_seen = after.ru_majflt if after.ru_inblock == before.ru_inblock else None

    def _pages(self, begins: Tensor, num_bytes: int) -> Tensor:
        """Return the pages that records are on, with repeats."""
        first, last = begins // mmap.PAGESIZE, (begins + (num_bytes - 1)) // mmap.PAGESIZE
        most = (num_bytes + mmap.PAGESIZE - 2) // mmap.PAGESIZE + 1
        return torch.minimum(first[:, None] + torch.arange(most, device="cpu"), last[:, None]).flatten()

    def allocate(self, begins: Tensor, num_bytes: int) -> None:
        """Have the disk keep room for records, so that storing to them cannot fail.

        Args:
            begins: where each record begins, int64 ``[num_records]``, in any order and with repeats.
            num_bytes: of each record.

        Raises:
            OSError: the disk has no room; the message says what to do.
        """
        pages = self._pages(begins, num_bytes)
        pages = torch.unique(pages[self._is_allocated[pages] == 0])
        for begin, end in _runs(pages):
            self.allocate_range(begin * mmap.PAGESIZE, end * mmap.PAGESIZE)
        self._is_allocated[pages] = 1

    def allocate_range(self, begin: int, end: int) -> None:
        """Do as ``allocate`` does for all bytes from ``begin`` up to ``end``."""
        end = min(end, len(self))
        if end <= begin:
            return
        try:
            os.posix_fallocate(self.fd, begin, end - begin)
        except OSError as error:
            raise _validate.disk_full_error(self.path, end - begin, error) from None

    def sync(self) -> None:
        """Wait until the disk has all that was stored, through the mapping too.

        Raises:
            OSError: the disk could not take it.
        """
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise _validate.file_error(self.path, "could not be written to the disk", error) from None


def _runs(pages: Tensor) -> list[tuple[int, int]]:
    """Return the stretches of consecutive numbers among ascending distinct ones, each as begin and end."""
    if len(pages) == 0:
        return []
    is_first = torch.ones(len(pages), dtype=torch.bool, device="cpu")
    is_first[1:] = pages[1:] != pages[:-1] + 1
    begins = is_first.nonzero()[:, 0]
    ends = torch.cat([begins[1:], torch.tensor([len(pages)], device="cpu")]) - 1
    return list(zip(pages[begins].tolist(), (pages[ends] + 1).tolist(), strict=True))


class Bits:
    """A bit for each of many things, eight in a byte of some zero-filled memory."""

    def __init__(self, memory: Tensor) -> None:
        """Keep the bits in uint8 ``memory``."""
        self._memory = memory

    @staticmethod
    def num_bytes(num_bits: int) -> int:
        """Return how many bytes hold so many bits."""
        return -(-num_bits // 8)

    @classmethod
    def reserved(cls, num_bits: int) -> Bits:
        """Return bits in memory that is committed where one is set."""
        num_bytes = cls.num_bytes(num_bits)
        return cls(ReservedArray(num_bytes, torch.uint8).first((num_bytes,)))

    def are_set(self, numbers: Tensor) -> Tensor:
        """Tell of each of ``numbers``, int64, whether its bit is set."""
        return (self._memory[numbers >> 3] & _mask(numbers)) != 0

    def set(self, numbers: Tensor) -> None:
        """Set the bits of ``numbers``, which are distinct and whose bits are not set yet."""
        self._memory.index_add_(0, numbers >> 3, _mask(numbers))  # of distinct unset bits the sum is the union


def _mask(numbers: Tensor) -> Tensor:
    return torch.ones_like(numbers, dtype=torch.uint8) << (numbers & 7).to(torch.uint8)


@contextmanager
def locked(fd: int, path: str) -> Iterator[None]:
    """Lock an open file or directory against every other process, and against everyone else in this one.

    The lock stays while a duplicate of ``fd`` is open that was made inside; an error gives it back at once, whatever
    holds on to such a duplicate. ``fd`` itself is closed.

    Raises:
        RuntimeError: somebody has it.
    """
    import fcntl  # where there is none, check_platform has refused before

    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _validate.locked_error(path) from None
        try:
            yield
        except BaseException:
            fcntl.flock(fd, fcntl.LOCK_UN)
            raise
    finally:
        os.close(fd)


def check_platform() -> None:
    """Refuse systems on which room cannot be allocated before it is written to, and those that are big-endian.

    Raises:
        OSError: the system is such a one.
    """
    if not hasattr(os, "posix_fallocate") or sys.byteorder != "little":  # as the files are
        raise _validate.platform_error()
