"""What takes files back to the last commit: the old contents of all records written since, and the file that names it.

A directory of moments is at commit ``n``: ``commit.json`` says so, and is only ever replaced whole, by a rename.
``undo-n.log`` has the contents that records had at commit ``n``, appended before a record is first written after it.
When the process dies, what it stored up to then is in the files, in the order of its stores; to put the log's contents
back is to have the files as they were at commit ``n``, however often that is done and wherever it is interrupted. The
next commit writes ``undo-(n+1).log``, empty, and then replaces ``commit.json``: from then on the old log says nothing.

An entry of the log is::

    magic "undo", file number (u32), records (u64), bytes of what follows (u64), CRC-32 of all but itself (u32)
    records' numbers (i64 each), then, for each part of a record, the old contents of that part of all records

little-endian. One that is incomplete or does not match its CRC is the last one, of whose records none was written yet.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _validate

COMMIT_FILE = "commit.json"
COMMIT_MAGIC = "sparseadam moments"
VERSION = 1

_COMMIT_KEYS = {"id", "commit", "next_number", "seeds", "parameters"}
_PARAMETER_KEYS = {"group", "position", "shape", "dtype", "table", "moments"}

_HEAD, _CRC = struct.Struct("<4sIQQ"), struct.Struct("<I")
_ENTRY_BYTES = _HEAD.size + _CRC.size
_ENTRY_MAGIC = b"undo"
# Contents that are copied out of the files at a time.
_MOST_BYTES = 8 << 20


class Records(NamedTuple):
    """Records that the log can take back.

    Attributes:
        number: tells them from those of other files of the same log.
        parts: what a record consists of: for each part the mapped memory of all records, uint8
            ``[num_records, part_bytes]``.
    """

    number: int
    parts: Sequence[Tensor]


class UndoLog:
    """The log of one commit, open for appending."""

    def __init__(self, directory: str, commit: int) -> None:
        """Begin the empty log of a commit; what stands there under its name is of no commit, and replaced."""
        self.path = log_path(directory, commit)
        self._end = 0
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self.close = weakref.finalize(self, os.close, self._fd)
        self.sync()

    def append(self, records: Records, numbers: Tensor) -> None:
        """Append what some records hold now, before they are written.

        Args:
            records: the file they are of.
            numbers: which ones, int64 ``[num_logged]``.

        Raises:
            OSError: the disk has no room. Entries that are there already stay, and do no harm.
        """
        record_bytes = sum(part.shape[1] for part in records.parts)
        at_once = max(_MOST_BYTES // max(record_bytes, 1), 1)
        for piece in torch.split(numbers, at_once):
            self._append_piece(records, piece)

    def _append_piece(self, records: Records, numbers: Tensor) -> None:
        num_bytes = [8, *(part.shape[1] for part in records.parts)]
        entry = bytearray(_ENTRY_BYTES + len(numbers) * sum(num_bytes))
        head, body = memoryview(entry)[: _HEAD.size], memoryview(entry)[_ENTRY_BYTES:]
        places = _split(body, len(numbers), num_bytes)
        places[0].view(torch.int64)[:, 0] = numbers
        for part, place in zip(records.parts, places[1:], strict=True):
            torch.index_select(part, 0, numbers, out=place)
        _HEAD.pack_into(entry, 0, _ENTRY_MAGIC, records.number, len(numbers), len(body))
        _CRC.pack_into(entry, _HEAD.size, zlib.crc32(body, zlib.crc32(head)))
        self._write(memoryview(entry))

    def _write(self, entry: memoryview) -> None:
        done = 0
        try:
            while done < len(entry):
                done += os.pwrite(self._fd, entry[done:], self._end + done)
        except OSError as error:  # the next entry goes over what there is of this one
            raise _validate.disk_full_error(self.path, len(entry), error) from None
        self._end += len(entry)

    def sync(self) -> None:
        """Wait until the disk has the log."""
        with naming(self.path):
            os.fsync(self._fd)


def roll_back(directory: str, commit: int, records: Mapping[int, Records]) -> bool:
    """Put the contents of a commit back into records; those of other files are passed over.

    Returns:
        Whether the log had any entry, of whichever file.

    Raises:
        FileNotFoundError: the log is gone.
        ValueError: an entry is of a record that its file does not have.
    """
    path = log_path(directory, commit)
    has_entries = False
    if not os.path.exists(path):
        raise _validate.missing_part_error(directory, path)
    for number, count, body in _entries(path):
        has_entries = True
        if number not in records:
            continue
        parts = records[number].parts
        num_bytes = [8, *(part.shape[1] for part in parts)]
        if len(body) != count * sum(num_bytes):
            raise _validate.damaged_error(path, f"an entry of {len(body)} bytes for {count} records")
        places = _split(body, count, num_bytes)
        numbers = places[0].view(torch.int64)[:, 0]
        for part, place in zip(parts, places[1:], strict=True):
            if not bool(((numbers >= 0) & (numbers < len(part))).all()):
                raise _validate.damaged_error(path, f"an entry of records beyond the {len(part)} of its file")
            part.index_copy_(0, numbers, place)
    return has_entries


def _entries(path: str) -> Iterator[tuple[int, int, memoryview]]:
    with open(path, "rb") as file:
        while True:
            head, crc = file.read(_HEAD.size), file.read(_CRC.size)
            if len(crc) < _CRC.size:
                return
            magic, number, count, num_bytes = _HEAD.unpack(head)
            if magic != _ENTRY_MAGIC or num_bytes > os.fstat(file.fileno()).st_size - file.tell():
                return
            body = bytearray(file.read(num_bytes))
            if len(body) < num_bytes or zlib.crc32(body, zlib.crc32(head)) != _CRC.unpack(crc)[0]:
                return
            yield number, count, memoryview(body)


def _split(body: memoryview, count: int, num_bytes: Sequence[int]) -> list[Tensor]:
    """Return an entry's parts, uint8 ``[count, part_bytes]`` each, in its memory."""
    places = []
    begin = 0
    for each in num_bytes:
        end = begin + count * each
        empty = torch.empty((count, each), dtype=torch.uint8, device="cpu")
        places.append(torch.frombuffer(body[begin:end], dtype=torch.uint8).view(count, each) if end > begin else empty)
        begin = end
    return places


def log_path(directory: str, commit: int) -> str:
    """Return the name of a commit's log."""
    return os.path.join(directory, f"undo-{commit}.log")


# The commit -----------------------------------------------------------------------------------------------------------


def read_commit(directory: str) -> dict[str, Any] | None:
    """Return what ``commit.json`` says, or None where there is none.

    Raises:
        ValueError: it is not ours, damaged, or of a later version.
    """
    path = os.path.join(directory, COMMIT_FILE)
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise _validate.foreign_error(path, "a commit of moments") from None
    if not isinstance(content, dict) or content.get("magic") != COMMIT_MAGIC:
        raise _validate.foreign_error(path, "a commit of moments")
    if content.get("version") != VERSION:
        raise _validate.version_error(path, content.get("version"), VERSION)
    missing = _COMMIT_KEYS - set(content)
    for entry in content.get("parameters", []):
        missing |= _PARAMETER_KEYS - set(entry)
    if missing:
        raise _validate.damaged_error(path, f"a commit without {', '.join(sorted(missing))}")
    return content


def write_commit(directory: str, content: Mapping[str, Any]) -> None:
    """Replace ``commit.json``, at once and on the disk.

    Raises:
        OSError: the disk could not take it. The old one stands, unless the message says that the new one does.
    """
    path = os.path.join(directory, COMMIT_FILE)
    text = json.dumps({"magic": COMMIT_MAGIC, "version": VERSION, **content}, indent=1).encode()
    replace_file(path, text)


def replace_file(path: str, content: bytes) -> None:
    """Write a file anew: it is the old one or the new one whole at any time, and on the disk when this returns."""
    fresh = f"{path}.new"
    with naming(fresh):
        with open(fresh, "wb", buffering=0) as file:
            write_whole(file.fileno(), content)
            os.fsync(file.fileno())
        os.replace(fresh, path)
    try:
        sync_directory(os.path.dirname(path))
    except OSError as error:
        raise _validate.replaced_file_error(path, error) from None


def write_whole(fd: int, content: bytes | memoryview) -> None:
    """Write all of it; a disk that is nearly full takes a part first."""
    left = memoryview(content)
    while len(left) > 0:
        left = left[os.write(fd, left) :]


def sync_directory(path: str) -> None:
    """Wait until the disk has a directory's names."""
    fd = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Have errors of the system name a file, which calls that are given a descriptor do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise _validate.file_error(path, "could not be written", error) from None
