"""Tables in files: ordinary tensors of mapped memory, whose rows get their initial values when they are first used.

A table is one file, in this order::

    4096 bytes          magic, version, and what the table is, as JSON; at 2048, the directory of moments that it is
                        committed with, as JSON; the last byte is 1 while rows were written since the last commit
    num_rows * dim      the rows
    num_rows / 8        a bit for each row that has its initial values; none for tables that begin with zeros

each part at a multiple of 4096 bytes. What was never touched is a hole, which takes no room on the disk.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import weakref
import zlib
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from . import _interrupts, _validate
from ._mapped_file import Bits, MappedFile, check_platform, locked
from ._validate import TABLE_DTYPES, Place
from .initial import Init
from .reading import Hooks, before_reading
from .undo_log import Records, naming, read_commit, roll_back, sync_directory, write_whole

_MAGIC = b"sparseadam table"
_VERSION = 1
_HEAD = struct.Struct("<16sI")
_BLOCK = struct.Struct("<II")  # length and CRC-32 of the JSON that follows
_PAGE = 4096
_ABOUT_BEGIN, _PAIRING_BEGIN, _WRITTEN_BYTE = _HEAD.size, 2048, 4095
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TABLE_DTYPES}

# Initial values that are made at a time.
_MOST_ELEMENTS = 1 << 20

# The mapped tables of this process by the address of their rows.
_tables: weakref.WeakValueDictionary[int, MappedTable] = weakref.WeakValueDictionary()


class MappedTable(MappedFile):
    """The file behind a table."""

    num_rows: int
    dim: int
    dtype: torch.dtype
    init: Init
    id: str
    # Whether rows are known to be initialized before they are read.
    has_announced_reads: bool
    # Threads may read the same new rows at once, of which each is to be given its values once, before it is trained.
    _turn: Lock

    def __new__(cls, path: str, fd: int, about: dict[str, Any]) -> MappedTable:
        """Map the file of a table that ``about`` describes; see ``_about``."""
        self: MappedTable = super().__new__(cls, path, fd, _num_bytes(about))  # type: ignore[assignment]
        self.num_rows, self.dim, self.dtype = about["num_rows"], about["dim"], _DTYPES[about["dtype"]]
        self.init = Init(*about["init"])
        self.id = about["id"]
        self.has_announced_reads = False
        self._turn = Lock()
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dim * self.dtype.itemsize

    def tensor(self) -> Tensor:
        """Return the rows, ``[num_rows, dim]``."""
        return self.view(_PAGE, (self.num_rows, self.dim), self.dtype)

    def records(self, number: int) -> Records:
        """Return the rows as the log takes them."""
        return Records(number, [self.view(_PAGE, (self.num_rows, self.row_bytes), torch.uint8)])

    def initialize(self, rows: Tensor) -> None:
        """Give rows their initial values, unless they had them before; threads that do so take turns.

        Args:
            rows: int64, inside the table, repeats included.

        Raises:
            OSError: the disk has no room; no row was touched.
        """
        if self.init.kind == "zeros":
            return
        with _interrupts.held(), self._turn:  # a handler that saves may come back to this
            new = torch.unique(self.without_values(rows))
            if len(new) == 0:
                return
            begin = _bits_begin(self.num_rows * self.row_bytes)
            self.allocate_rows(new)
            self.allocate(begin + (new >> 3), 1)
            table, has_values = self.tensor(), self._has_values()
            for piece in torch.split(new, max(_MOST_ELEMENTS // self.dim, 1)):
                table[piece] = self.init.values(piece, self.dim, self.dtype)
                # After the values: a process that dies in between leaves rows that are made again.
                has_values.set(piece)

    def without_values(self, rows: Tensor) -> Tensor:
        """Return those of ``rows`` that have not been given their initial values."""
        return rows[:0] if self.init.kind == "zeros" else rows[~self._has_values().are_set(rows)]

    def before_writing(self, rows: Tensor) -> None:
        """See to it that rows have their initial values and that storing to them cannot fail.

        Args:
            rows: int64, inside the table.

        Raises:
            RuntimeError: rows that had not got their initial values were read, as nobody tells which ones are.
            OSError: the disk has no room; no row was touched.
        """
        if not self.has_announced_reads and len(unready := self.without_values(rows)) > 0:
            raise _validate.unannounced_reads_error(self.path, int(unready[0]), self.init.kind)
        self.initialize(rows)
        if self.init.kind == "zeros":  # others have room since they have their values
            self.allocate_rows(rows)

    def is_whole(self, table: Tensor) -> bool:
        """Whether a tensor of this memory is the table, not a part of it or another view."""
        return table.shape == (self.num_rows, self.dim) and table.is_contiguous() and table.dtype is self.dtype

    def prefetch_rows(self, rows: Tensor) -> None:
        """Have the system read rows that are about to be looked at; see ``prefetch``."""
        self.prefetch(_PAGE + rows * self.row_bytes, self.row_bytes)

    def allocate_rows(self, rows: Tensor) -> None:
        """Have the disk keep room for rows.

        Raises:
            OSError: it has none.
        """
        self.allocate(_PAGE + rows * self.row_bytes, self.row_bytes)

    def _has_values(self) -> Bits:
        num_bytes = Bits.num_bytes(self.num_rows)
        return Bits(self.view(_bits_begin(self.num_rows * self.row_bytes), (num_bytes,), torch.uint8))

    # Which moments the table is committed with -----------------------------------------------------------------------

    @property
    def pairing(self) -> dict[str, str] | None:
        """The directory of moments that the table is committed with: its ``id``, ``path`` and ``relative`` path."""
        return _read_block(self[_PAIRING_BEGIN:_WRITTEN_BYTE])

    def pair(self, directory_id: str, directory: str) -> None:
        """Have the table committed with a directory of moments from now on."""
        block = self.check_pairing(directory_id, directory)
        with naming(self.path):
            os.pwrite(self.fd, block, _PAIRING_BEGIN)
        self.sync()

    def check_pairing(self, directory_id: str, directory: str) -> bytes:
        """Return what ``pair`` writes.

        Raises:
            ValueError: the path of the directory is too long.
        """
        here = os.path.dirname(os.path.realpath(self.path))
        directory = os.path.realpath(directory)
        block = _block({"id": directory_id, "path": directory, "relative": os.path.relpath(directory, here)})
        if len(block) > _WRITTEN_BYTE - _PAIRING_BEGIN:
            raise _validate.long_path_error(directory)
        return block

    def is_paired_with(self, directory_id: str) -> bool:
        """Whether the table is committed with this directory of moments; quicker than to read ``pairing``."""
        return directory_id.encode() in bytes(self[_PAIRING_BEGIN:_WRITTEN_BYTE])

    @property
    def is_written(self) -> bool:
        """Whether rows may have been written since the last commit."""
        return self[_WRITTEN_BYTE] != 0

    @is_written.setter
    def is_written(self, is_written: bool) -> None:
        self[_WRITTEN_BYTE] = int(is_written)

    def roll_back(self) -> None:
        """Take rows back to the last commit, if they were written since.

        Raises:
            FileNotFoundError: the directory that can tell how is gone.
            ValueError: the note of where it is is damaged.
        """
        pairing = self.pairing
        if not self.is_written:
            return
        if pairing is None:
            raise _validate.damaged_error(self.path, "a note of its moments that does not match its checksum")
        here = os.path.dirname(os.path.realpath(self.path))
        for directory in (os.path.join(here, pairing["relative"]), pairing["path"]):
            commit = read_commit(directory)
            if commit is not None and commit["id"] == pairing["id"]:
                tables = (each["table"] for each in commit["parameters"] if each["table"] is not None)
                numbers = [table["number"] for table in tables if table["id"] == self.id]
                roll_back(directory, commit["commit"], {number: self.records(number) for number in numbers})
                self.sync()
                self.is_written = False  # what is written from now on, by whoever has the table alone, stays
                return
        raise _validate.lost_moments_error(self.path, pairing["path"])


def find(table: Tensor) -> MappedTable | None:
    """Return the file behind a tensor, or None where it is ordinary memory; a part of a table has the table's."""
    if not _tables or table.layout is not torch.strided or table.device.type != "cpu":
        return None
    return _tables.get(table.untyped_storage().data_ptr())


def find_whole(table: Tensor, place: Place | str) -> MappedTable | None:
    """Do as ``find`` does for a tensor whose row numbers are to be the file's.

    Raises:
        ValueError: it is a part of the table, or another view of it.
    """
    mapped = find(table)
    if mapped is not None and not mapped.is_whole(table):
        raise _validate.partial_table_error(place, mapped.path)
    return mapped


def memory_mapped(
    path: str | os.PathLike[str],
    num_rows: int | None = None,
    dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    init: str | tuple[str, float] = "zeros",
    seed: int = 0,
) -> Tensor:
    r"""Open a table in a file, or create it: a tensor ``[num_rows, dim]`` that may be larger than memory.

    Only pages that are looked at are read and only those that were stored to are written; the file is sparse where
    nothing was touched, and a table of 10**9 rows costs nothing to create. The tensor is an ordinary one, for
    ``nn.Embedding.from_pretrained(table, freeze=False, sparse=True)`` or ``nn.Parameter(table)``::

        table = sparseadam.memory_mapped("items.table", 10**9, 64, init=("normal", 0.01))
        embedding = nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
        sparseadam.initialize_on_read(embedding)
        optimizer = SparseAdam(embedding.parameters(), moment_dir="items.moments")
        ...
        optimizer.checkpoint()

    A file that is there is opened, as of the last :meth:`SparseAdam.checkpoint` where it was trained with a
    ``moment_dir``: rows that were written later are put back. It is locked while any tensor of it lives. What is
    written to it other than by :class:`SparseAdam` is not taken back. Linux only.

    Args:
        path: of the file. Its directory must exist.
        num_rows: how many rows, at least 1. Leave it and ``dim`` out to open a file that must be there.
        dim: elements of a row, at least 1.
        dtype: float32, float64, bfloat16 or float16.
        init: ``"zeros"``, ``("normal", standard_deviation)`` or ``("uniform", bound)``, each element then being a
            function of ``seed``, row and column alone (:meth:`sparseadam.initial.Init.values` has the formula). Rows
            get these values when they are first used, so with any other than ``"zeros"`` somebody must tell which rows
            are about to be read: see :func:`initialize_on_read` and :func:`initialize_rows`.
        seed: in [0, 2**53).

    Raises:
        FileNotFoundError: there is no such directory, or no file and ``num_rows`` and ``dim`` are left out; or the
            moments are gone with which rows were being trained.
        ValueError: an argument outside its range, or not what the file says; or a file that is no table, is truncated
            or was written by a later version. The file is as it was.
        TypeError: an argument of the wrong type.
        RuntimeError: the file is open in another process, or in this one.
        OSError: the system refuses; the message has its reason.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/items.table"
        >>> memory_mapped(path, 1_000_000_000, 64, init=("normal", 0.01)).shape
        torch.Size([1000000000, 64])
    """
    check_platform()
    path = os.path.abspath(os.fsdecode(path))
    wanted = None
    if num_rows is not None or dim is not None:
        wanted = _about(num_rows, dim, dtype, init, seed)
    fd = _open_file(path, wanted)
    with locked(fd, path):
        found = _read_about(path, fd)
        if wanted is not None:
            _validate.check_same_table(path, found, wanted)
        table = MappedTable(path, fd, found)
        table.roll_back()
    tensor = table.tensor()
    _tables[tensor.untyped_storage().data_ptr()] = table
    return tensor


def initialize_rows(table: Tensor, rows: Tensor) -> None:
    """Give rows of a memory-mapped table their initial values, as must be done before they are first read.

    Rows that have them, and tables that begin with zeros, are left alone.

    Args:
        table: what :func:`memory_mapped` returned, or a parameter made of it.
        rows: int64 ``[num_read]``, repeats included.

    Raises:
        ValueError: the table is not a memory-mapped one.
        TypeError: ``rows`` is not an int64 tensor of one dimension.
        IndexError: a row outside the table.
        OSError: the disk has no room; no row was touched.
    """
    mapped = find(table)
    if mapped is None:
        raise _validate.not_mapped_error()
    _validate.check_rows(rows, f"the table in {mapped.path!r}")
    _validate.check_row_range(rows, mapped.num_rows, f"the table in {mapped.path!r}")
    mapped.has_announced_reads = True
    mapped.initialize(rows)


def initialize_on_read(model: nn.Module) -> Hooks:
    """Have rows of a model's memory-mapped tables initialized just before modules look them up for the first time.

    That goes for ``nn.Embedding`` and ``nn.EmbeddingBag`` and modules with a ``register_read_hook``
    (:mod:`sparseadam.reading`), in training and evaluation. Where a model reads tables otherwise, call
    :func:`initialize_rows` before.

    Args:
        model: with at least one memory-mapped table among its parameters.

    Returns:
        A handle; ``remove()`` takes the hooks off.

    Raises:
        ValueError: none of the model's parameters is a memory-mapped table, one is a part of one, or a module has a
            ``max_norm``, which writes to rows that are read.
    """
    found = [(each, find_whole(each, f"parameter {name!r}")) for name, each in model.named_parameters()]
    tables = {parameter: mapped for parameter, mapped in found if mapped is not None}
    if not tables:
        raise _validate.no_mapped_table_error()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "max_norm", None) is not None and any(weight is table for table in tables):
            raise _validate.max_norm_error(name)
    for mapped in tables.values():
        mapped.has_announced_reads = True
    return before_reading(model, list(tables), _initialize_read_rows)


def _initialize_read_rows(table: Tensor, rows: Tensor) -> None:
    mapped = find(table)
    if mapped is not None:
        rows = rows.cpu()
        rows = rows[(rows >= 0) & (rows < mapped.num_rows)]  # the module refuses the others
        mapped.prefetch_rows(rows)
        mapped.initialize(rows)


# The file ----------------------------------------------------------------------------------------------------------


def _about(num_rows: object, dim: object, dtype: object, init: object, seed: object) -> dict[str, Any]:
    """Return what a table is, as it is written into its file, having checked the arguments."""
    kind, scale = _validate.check_init(init)
    about = {
        "num_rows": _validate.check_mapped_size(num_rows, "num_rows"),
        "dim": _validate.check_mapped_size(dim, "dim"),
        "dtype": str(_validate.check_table_dtype(dtype)).removeprefix("torch."),
        "init": [kind, scale, _validate.check_seed(seed)],
    }
    _validate.check_file_size(_num_bytes(about))
    return about


def _num_bytes(about: dict[str, Any]) -> int:
    row_bytes = about["dim"] * _DTYPES[about["dtype"]].itemsize
    has_bits = about["init"][0] != "zeros"
    return _bits_begin(about["num_rows"] * row_bytes) + _whole_pages(Bits.num_bytes(about["num_rows"]) * has_bits)


def _bits_begin(num_bytes_of_rows: int) -> int:
    return _PAGE + _whole_pages(num_bytes_of_rows)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE


def _open_file(path: str, wanted: dict[str, Any] | None) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if wanted is None:
            raise _validate.missing_table_error(path) from None
    _create(path, wanted)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def _create(path: str, about: dict[str, Any]) -> None:
    """Create a table's file, which is there whole or not at all, and never in the place of another."""
    fresh = f"{path}.{uuid.uuid4().hex}.new"
    header = bytearray(_PAGE)
    about_block = _block({**about, "id": uuid.uuid4().hex})
    header[: _HEAD.size] = _HEAD.pack(_MAGIC, _VERSION)
    header[_ABOUT_BEGIN : _ABOUT_BEGIN + len(about_block)] = about_block
    try:
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        raise _validate.missing_place_error(path) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    with naming(path):
        try:
            write_whole(fd, bytes(header))
            os.ftruncate(fd, _num_bytes(about))
            os.fsync(fd)
            os.link(fresh, path)
        finally:
            os.close(fd)
            os.unlink(fresh)
        sync_directory(os.path.dirname(path))


def _read_about(path: str, fd: int) -> dict[str, Any]:
    with naming(path):
        header = os.pread(fd, _PAGE, 0)
    if len(header) < _PAGE or not header.startswith(_MAGIC):
        raise _validate.foreign_error(path, "a table")
    version = _HEAD.unpack_from(header)[1]
    if version != _VERSION:
        raise _validate.version_error(path, version, _VERSION)
    about = _read_block(header[_ABOUT_BEGIN:_PAIRING_BEGIN])
    if about is None:
        raise _validate.damaged_error(path, "a header that does not match its checksum")
    num_bytes = os.fstat(fd).st_size
    if num_bytes != _num_bytes(about):
        raise _validate.damaged_error(path, f"{num_bytes} bytes in place of {_num_bytes(about)}")
    return about


def _block(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return _BLOCK.pack(len(text), zlib.crc32(text)) + text


def _read_block(memory: bytes) -> dict[str, Any] | None:
    length, crc = _BLOCK.unpack_from(memory)
    text = memory[_BLOCK.size : _BLOCK.size + length]
    if length == 0 or zlib.crc32(text) != crc:
        return None
    content: dict[str, Any] = json.loads(text)
    return content
