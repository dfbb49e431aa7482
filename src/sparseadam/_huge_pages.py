"""Tables in huge pages.

The rows of a step lie far apart. In pages of 4 KiB, which is what PyTorch allocates unless the system uses huge ones
everywhere, most of them cost a walk through the page tables before their first line can be fetched; in pages of 2 MiB
few do. From Linux 6.1 on the system moves memory into huge pages when it is asked to. Addresses and contents stay, and
so does what is resident: pages that were never touched are left alone.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

# The page tables of less stay in the processor's caches.
_MIN_BYTES = 4 << 20
# What is looked at and moved at a time, so that the notes of it do not grow with the table and a signal need not wait.
_BYTES_AT_ONCE = 64 << 20

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_COLLAPSE = 25  # Python's mmap has no name for it


class Span(NamedTuple):
    """Addresses from ``begin`` up to ``end``."""

    begin: int
    end: int


def move_into_huge_pages(begin: int, num_bytes: int) -> None:
    """Have the system move memory into huge pages, as far as it is resident and this process's alone.

    Nothing happens where the system does not do that, was told never to, or has no huge pages left. It takes about as
    long as copying the memory.

    Args:
        begin: address of the first byte.
        num_bytes: how many there are; less than 4 MiB stay where they are.
    """
    huge_bytes = _huge_page_bytes() if num_bytes >= _MIN_BYTES else 0
    if huge_bytes == 0:
        return
    for own in _private_memory(Span(begin, begin + num_bytes)):
        for span in _resident_huge_pages(own, huge_bytes):
            if _collapse(span) not in (0, errno.EAGAIN):  # which is said of pages that are in use at the moment
                return


def _collapse(span: Span) -> int:
    refused = _libc().madvise(ctypes.c_void_p(span.begin), ctypes.c_size_t(span.end - span.begin), _MADV_COLLAPSE)
    return ctypes.get_errno() if refused else 0


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _huge_page_bytes() -> int:
    """Return the size of the huge pages that may be asked for, 0 where none may be.

    The request itself would be granted under the setting ``never``, too.
    """
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return 0
        return int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def _private_memory(span: Span) -> Iterator[Span]:
    """Yield the parts that have no file behind them and are not shared with other processes."""
    try:
        mappings = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for mapping in mappings:
        addresses, permissions, _, _, inode = mapping.split(maxsplit=5)[:5]
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if permissions.endswith("p") and inode == "0" and begin < span.end and span.begin < end:
            yield Span(max(begin, span.begin), min(end, span.end))


def _resident_huge_pages(span: Span, huge_bytes: int) -> Iterator[Span]:
    """Yield the stretches of places of huge pages in which every small page is resident."""
    begin = -(-span.begin // huge_bytes) * huge_bytes
    end = span.end // huge_bytes * huge_bytes
    at_once = max(_BYTES_AT_ONCE // huge_bytes, 1) * huge_bytes
    for first in range(begin, end, at_once):
        are_resident = _are_resident(Span(first, min(first + at_once, end)), huge_bytes)
        for is_resident, places in groupby(range(len(are_resident)), are_resident.__getitem__):
            if is_resident:
                place, *others = places
                yield Span(first + place * huge_bytes, first + (place + len(others) + 1) * huge_bytes)


def _are_resident(span: Span, huge_bytes: int) -> list[bool]:
    """Tell of each place of a huge page whether all of it is resident."""
    num_bytes = span.end - span.begin
    pages = (ctypes.c_ubyte * (num_bytes // mmap.PAGESIZE))()
    if _libc().mincore(ctypes.c_void_p(span.begin), ctypes.c_size_t(num_bytes), pages):
        return []
    is_resident = torch.frombuffer(pages, dtype=torch.uint8) & 1
    return is_resident.view(-1, huge_bytes // mmap.PAGESIZE).all(1).tolist()
