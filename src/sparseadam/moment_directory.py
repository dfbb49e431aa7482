"""Moments in files, and commits of tables and moments together.

A directory of moments has ``commit.json`` and the log of what was written since (``undo_log.py``), and::

    moments-N/        the moments of one table: a file for each record that a slot has, slot after slot, and the index
    values-N.pt       at commit N, what is kept in memory: other parameters, the states of dense ones, and the steps
                      that rows may have missed

Slots beyond those of the commit are void. So are files that ``commit.json`` does not name; they are removed when the
directory is opened, and by the next commit. Moments that come from elsewhere (a state dict, a gradient of another
``sparse_dim``) get files of their own, and the old ones stay until a commit names the new ones.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _interrupts, _validate, mapped_table
from ._mapped_file import Bits, MappedFile, check_platform, locked
from ._memory import Part, ReservedMemory, SlotArray, index_dtype
from ._validate import SEED, Place
from .history import History
from .mapped_table import MappedTable
from .moments import Moments, StateLayout, moment_dtype
from .undo_log import (
    COMMIT_FILE,
    Records,
    UndoLog,
    log_path,
    naming,
    read_commit,
    roll_back,
    sync_directory,
    write_commit,
)

# What is counted for a table as a whole.
_COUNTERS = ("step", "num_slots", "num_skipped", "log_decay")
_ROWS_CHECKED_AT_ONCE = 1 << 20

_OUR_NAMES = re.compile(r"commit\.json(\.new)?|undo-\d+\.log|values-\d+\.pt|moments-\d+")

# What is there only when the first commit was completed.
_AFTER_FIRST_COMMIT = re.compile(r"undo-[1-9]\d*\.log|values-[1-9]\d*\.pt|moments-\d+")
# What is saved of what is in memory.
_VALUES = {"parameters", "states", "histories"}


class Write(NamedTuple):
    """Rows that are about to be written.

    ``rows`` is int64 ``[num_touched]`` on the CPU, distinct, of the table viewed as ``[num_rows, width]``.
    """

    table: Tensor
    moments: Moments
    rows: Tensor


class Kept(NamedTuple):
    """A parameter and what is kept for it: moments, the state of dense gradients, or nothing yet."""

    place: Place
    parameter: Tensor
    state: Moments | Mapping[str, Any] | None


class FileMemory(ReservedMemory):
    """Slots in mapped files, a file for each record; as many as the disk keeps room for are capacity."""

    def __init__(
        self, directory: str, number: int, num_rows: int, parts: Mapping[str, Part], num_committed: int
    ) -> None:
        """Open the files, or create them where no slot of theirs is committed; slots beyond the committed are zero.

        Args:
            directory: of the moments of one table.
            number: of these files in the log.
            num_rows: of the table.
            parts: what is kept for a slot.
            num_committed: how many slots the last commit has.
        """
        self.directory = directory
        self.number = number
        self.num_committed = num_committed
        self._num_rows = num_rows
        self._files: dict[str, MappedFile] = {}
        super().__init__(num_rows, parts)
        self.capacity = num_committed
        self._index_dtype = index_dtype(num_rows)
        self._index = self._open("index", num_rows * self._index_dtype.itemsize, 0)
        self.is_logged = Bits.reserved(num_rows)

    def _reserve(self, record: str, num_elements: int, dtype: torch.dtype) -> SlotArray:
        num_bytes = num_elements * dtype.itemsize
        file = self._open(record.replace(" ", "-"), num_bytes, num_bytes // max(self._num_rows, 1) * self.num_committed)
        self._files[record] = file
        return _FileArray(file, dtype)

    def _open(self, name: str, num_bytes: int, num_kept: int) -> MappedFile:
        """Open a file whose first bytes are a commit's, and make zeros of all others."""
        path = os.path.join(self.directory, name)
        num_bytes = max(num_bytes, 1)  # an empty file cannot be mapped
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if num_kept == 0 else 0), 0o666)
        try:
            found = os.fstat(fd).st_size
            # It is between the two sizes where this was interrupted below, once.
            if num_kept > 0 and not num_kept <= found <= num_bytes:
                raise _validate.damaged_error(path, f"{found} bytes in place of {num_bytes}")
            with naming(path):
                os.ftruncate(fd, num_kept)
                os.ftruncate(fd, num_bytes)
            return MappedFile(path, fd, num_bytes)
        finally:
            os.close(fd)

    @property
    def index(self) -> Tensor:
        """The index of the rows, on no more of the disk than is allocated."""
        return self._index.view(0, (self._num_rows,), self._index_dtype)

    def allocate_index(self, rows: Tensor) -> None:
        """Have the disk keep room for rows in the index.

        Raises:
            OSError: it has none.
        """
        self._index.allocate(rows * self._index_dtype.itemsize, self._index_dtype.itemsize)

    def prefetch(self, slots: Tensor) -> None:
        """Have the system read slots that are about to be looked at; see ``MappedFile.prefetch``."""
        for file in self._files.values():
            file.prefetch(slots * self._slot_bytes(file), self._slot_bytes(file))

    def prefetch_index(self, rows: Tensor) -> None:
        """Do so for rows in the index."""
        self._index.prefetch(rows * self._index_dtype.itemsize, self._index_dtype.itemsize)

    def grow(self, num_slots: int) -> None:
        """Have the disk keep room for slots.

        Raises:
            OSError: it has none.
        """
        for file in self._files.values():
            slot_bytes = self._slot_bytes(file)
            file.allocate_range(self.capacity * slot_bytes, num_slots * slot_bytes)
        self.capacity = num_slots

    def _slot_bytes(self, file: MappedFile) -> int:
        return len(file) // max(self._num_rows, 1)

    def records(self) -> Records:
        """Return the slots as the log takes them."""
        files = self._files.values()
        return Records(
            self.number, [file.view(0, (self._num_rows, self._slot_bytes(file)), torch.uint8) for file in files]
        )

    def sync(self) -> None:
        """Wait until the disk has all slots; the index is made anew when the files are opened."""
        for file in self._files.values():
            file.sync()

    def commit(self, num_slots: int) -> Callable[[], None]:
        """Return what takes note of a commit with so many slots; it needs no memory."""
        none_logged = Bits.reserved(self._num_rows)

        def note() -> None:
            self.num_committed, self.is_logged = num_slots, none_logged

        return note


class _FileArray:
    """A file as one array."""

    def __init__(self, file: MappedFile, dtype: torch.dtype) -> None:
        self._file = file
        self._dtype = dtype

    def first(self, shape: Sequence[int]) -> Tensor:
        """Return its beginning as a tensor of ``shape``."""
        return self._file.view(0, shape, self._dtype)


class _Table:
    """A memory-mapped table that is committed with this directory."""

    def __init__(self, mapped: MappedTable, number: int, *, is_pending: bool) -> None:
        self.mapped = mapped
        self.number = number
        # Named in a commit, but the table's own file does not say yet that it is committed here.
        self.is_pending = is_pending
        self.is_logged = Bits.reserved(mapped.num_rows)

    def commit(self) -> Callable[[], None]:
        """Return what takes note of a commit; it needs no memory."""
        none_logged = Bits.reserved(self.mapped.num_rows)

        def note() -> None:
            self.is_logged, self.mapped.is_written = none_logged, False

        return note


class MomentDirectory:
    """An optimizer's moments in files, open until it goes.

    Attributes:
        path: of the directory.
        states: what the last commit keeps for each parameter, by its number: moments, or the saved state of dense
            gradients.
        seeds: of each group at the last commit, None where it had none; none at all in a new directory.
    """

    def __init__(self, path: str | os.PathLike[str], kept: Sequence[Kept], layouts: Sequence[StateLayout]) -> None:
        """Open a directory as of its last commit, or begin one with the parameters as they are.

        Parameters in memory get the values that they had at the last commit, and tables in files are taken back to it.

        Args:
            path: of the directory; made where it is missing, but not what it is in.
            kept: the optimizer's parameters, without states.
            layouts: of the moments of each, as its group's options have them.

        Raises:
            FileNotFoundError: a file that the last commit names is gone, or there is no place for the directory.
            ValueError: the directory is something else's, or its commit does not fit the parameters or options.
            RuntimeError: it is in use.
            OSError: the system refuses; the message has its reason. What was committed stays.
        """
        check_platform()
        self.path = os.path.abspath(os.fsdecode(path))
        self.states: dict[int, Moments | Mapping[str, Any]] = {}
        self.seeds: list[int | None] = []
        self._tables: dict[str, _Table] = {}
        # Of the mapped table that a parameter, by its id(), has its memory in.
        self._table_ids: dict[int, str | None] = {}
        self._log: UndoLog | None = None
        try:
            os.mkdir(self.path)
        except FileExistsError:
            pass
        except FileNotFoundError:
            raise _validate.missing_place_error(self.path) from None
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with locked(fd, self.path):
            weakref.finalize(self, os.close, os.dup(fd))
            content = read_commit(self.path)
            if content is None:
                self._check_empty()
                self._id, self._commit, self._next_number = uuid.uuid4().hex, -1, 0
                self.add(kept, kept)
            else:
                self._id, self._commit, self._next_number = content["id"], content["commit"], content["next_number"]
                self._resume(content, kept, layouts)

    def _check_empty(self) -> None:
        """Refuse a directory without a commit that is not new: it may have what the first one left unfinished."""
        names = os.listdir(self.path)
        foreign = sorted(name for name in names if not _OUR_NAMES.fullmatch(name))
        if foreign:
            raise _validate.foreign_directory_error(self.path, foreign[0])
        if any(_AFTER_FIRST_COMMIT.fullmatch(name) for name in names):
            raise _validate.missing_part_error(self.path, os.path.join(self.path, COMMIT_FILE))

    # Opening ---------------------------------------------------------------------------------------------------------

    def _resume(self, content: Mapping[str, Any], kept: Sequence[Kept], layouts: Sequence[StateLayout]) -> None:
        entries: Sequence[Mapping[str, Any]] = content["parameters"]
        _validate.check_committed_places(
            self.path, [(entry["group"], entry["position"]) for entry in entries], [each.place for each in kept]
        )
        for entry, each, layout in zip(entries, kept, layouts, strict=True):
            self._check_entry(entry, each, layout)
        values = self._load_values(kept)
        # A table that was opened by itself has been taken back already, and may have been changed since.
        written = [table for table in self._tables.values() if table.mapped.is_written]
        records = {table.number: table.mapped.records(table.number) for table in written}
        memories: dict[int, FileMemory] = {}
        for number, (entry, each) in enumerate(zip(entries, kept, strict=True)):
            if entry["moments"] is not None:
                moments = self._open_moments(entry["moments"], each)
                memory = memories[number] = _memory_of(moments)
                records[memory.number] = memory.records()
                self.states[number] = moments
        has_entries = roll_back(self.path, self._commit, records)
        for number in memories:
            self._index(number, entries[number]["moments"])
        self._take_values(values, kept)
        self.seeds = content["seeds"]
        present = [Kept(each.place, each.parameter, self.states.get(number)) for number, each in enumerate(kept)]
        if has_entries or any(table.is_pending for table in self._tables.values()):
            self.add([], present)
        else:
            self._log = UndoLog(self.path, self._commit)
            for table in self._tables.values():
                table.mapped.is_written = False
            self._sweep(present)

    def _check_entry(self, entry: Mapping[str, Any], each: Kept, layout: StateLayout) -> None:
        """Refuse a parameter that is not the one of a commit; take note of its table."""
        place, parameter = each.place, each.parameter
        for what, found, wanted in (
            ("shape", list(parameter.shape), entry["shape"]),
            ("dtype", str(parameter.dtype), entry["dtype"]),
        ):
            if found != wanted:
                raise _validate.committed_parameter_error(self.path, place, f"{what} {wanted}", f"{what} {found}")
        mapped, saved = mapped_table.find_whole(each.parameter, each.place), entry["table"]
        if (mapped is None) != (saved is None):
            inside, outside = "its table in memory", "a memory-mapped table"
            found, wanted = (inside, outside) if mapped is None else (outside, inside)
            raise _validate.committed_parameter_error(self.path, place, wanted, found)
        if mapped is not None:
            if mapped.id != saved["id"]:
                raise _validate.committed_table_error(self.path, place, saved["path"], mapped.path)
            pairing = mapped.pairing
            is_ours = pairing is not None and pairing["id"] == self._id
            if not is_ours and not saved["is_pending"]:
                raise _validate.repaired_table_error(self.path, place, mapped.path, pairing)
            self._tables[mapped.id] = _Table(mapped, saved["number"], is_pending=not is_ours)
        self._table_ids[id(parameter)] = None if mapped is None else mapped.id
        if entry["moments"] is not None and _read_layout(entry["moments"]["layout"]) != layout:
            raise _validate.committed_layout_error(self.path, place, _read_layout(entry["moments"]["layout"]), layout)

    def _open_moments(self, saved: Mapping[str, Any], each: Kept) -> Moments:
        shape = each.parameter.shape
        layout, dtype = _read_layout(saved["layout"]), moment_dtype(each.parameter.dtype)
        memory = self._file_memory(saved["number"], shape, saved["sparse_dim"], dtype, layout, saved["num_slots"])
        return Moments(shape, saved["sparse_dim"], dtype, torch.device("cpu"), layout, memory)

    def _index(self, number: int, saved: Mapping[str, Any]) -> None:
        """Read counters and rows, once the slots are those of the commit."""
        moments = self.states[number]
        assert isinstance(moments, Moments)
        memory = _memory_of(moments)
        for name in _COUNTERS:
            setattr(moments, name, saved[name])
        for rows in torch.split(moments.rows, _ROWS_CHECKED_AT_ONCE):
            if not bool(((rows >= 0) & (rows < moments.num_rows)).all()):
                raise _validate.damaged_error(memory.directory, f"rows beyond the {moments.num_rows} of the table")
            memory.allocate_index(rows)
        moments.index_rows()

    def _load_values(self, kept: Sequence[Kept]) -> dict[str, dict[int, Any]]:
        """Return what the commit saved of what is in memory."""
        path = self._values_path(self._commit)
        try:
            saved: dict[str, dict[int, Any]] = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise _validate.missing_part_error(self.path, path) from None
        except Exception as error:  # of whatever a damaged file makes of unpickling
            raise _validate.damaged_error(path, _validate.reason_of(error)) from error
        in_memory = [
            number for number, each in enumerate(kept) if mapped_table.find_whole(each.parameter, each.place) is None
        ]
        if not isinstance(saved, dict) or set(saved) != _VALUES or sorted(saved["parameters"]) != in_memory:
            raise _validate.damaged_error(path, "something other than the values of the parameters in memory")
        return saved

    def _take_values(self, saved: Mapping[str, Mapping[int, Any]], kept: Sequence[Kept]) -> None:
        with torch.no_grad():
            for number, value in saved["parameters"].items():
                kept[number].parameter.copy_(value)
        self.states.update(saved["states"])
        for number, history in saved["histories"].items():
            moments = self.states[number]
            assert isinstance(moments, Moments), "only moments have a history"
            moments.history = History.of(history["base"], history["numbers"])

    # Keeping ---------------------------------------------------------------------------------------------------------

    def add(self, new: Sequence[Kept], kept: Sequence[Kept]) -> None:
        """Take up parameters, and commit all there are as they are now.

        Args:
            new: those to take up.
            kept: all of the optimizer's.

        Raises:
            ValueError: a table that is part of a memory-mapped one.
            OSError: the disk could not take the commit.
        """
        mapped_tables = [mapped_table.find_whole(each.parameter, each.place) for each in new]
        new_tables = [mapped for mapped in mapped_tables if mapped is not None and mapped.id not in self._tables]
        for mapped in new_tables:
            mapped.check_pairing(self._id, self.path)
        commit, tables = self._commit, dict(self._tables)
        try:
            for mapped in new_tables:
                self._tables[mapped.id] = _Table(mapped, self._new_number(), is_pending=True)
            self.commit(kept)
        except BaseException:
            if self._commit == commit:
                self._tables = tables
            raise
        for each, its_table in zip(new, mapped_tables, strict=True):
            self._table_ids[id(each.parameter)] = None if its_table is None else its_table.id
        pending = [table for table in self._tables.values() if table.is_pending]
        for table in pending:
            table.mapped.pair(self._id, self.path)
            table.is_pending = False
        if pending:
            write_commit(self.path, self._describe(self._commit, kept))

    def keep(self, moments: Moments, place: Place) -> Moments:
        """Return moments in files: these, or a copy of them where they are elsewhere.

        Raises:
            RuntimeError: they are on another device than the CPU.
            OSError: the disk has no room.
        """
        if self._holds(moments):
            return moments
        if moments.device.type != "cpu":
            raise _validate.moment_device_error(place, moments.device)
        number = self._new_number()
        os.makedirs(self._moments_path(number), exist_ok=True)
        memory = self._file_memory(number, moments.shape, moments.sparse_dim, moments.dtype, moments.layout, 0)
        memory.allocate_index(moments.rows)
        return moments.moved(moments.device, memory)

    def before_writing(self, writes: Sequence[Write]) -> None:
        """See to it that rows and their moments can be written, and taken back.

        Every row gets its slot's room and its initial values, blocks on the disk are allocated, and what rows and
        slots hold goes into the log, unless it did so since the last commit.

        Raises:
            RuntimeError: a table that is committed with other moments, or whose rows were read before they had their
                initial values.
            OSError: the disk has no room. Nothing of what is kept has been changed.
        """
        tables = [self._make_room(write) for write in writes]
        for write, table in zip(writes, tables, strict=True):
            if table is not None:
                self._log_rows(table, write.rows)
            slots = _slots_of(write.moments, write.rows)
            _memory_of(write.moments).prefetch(slots)
            self._log_slots(write.moments, slots)

    def _make_room(self, write: Write) -> _Table | None:
        table = self._table_of(write.table)
        if table is not None:
            table.mapped.before_writing(write.rows)
        self._make_slots(write.moments, write.rows)
        return table

    def _make_slots(self, moments: Moments, rows: Tensor) -> None:
        """Have the disk keep room for the slots that rows need.

        Raises:
            OSError: it has none.
        """
        memory = _memory_of(moments)
        memory.prefetch_index(rows)
        new = rows[moments.slot_of_row[rows] == 0]
        moments.grow(moments.num_slots + len(new))
        memory.allocate_index(new)

    def _log_rows(self, table: _Table, rows: Tensor) -> None:
        new = rows[~table.is_logged.are_set(rows)]
        if len(new) > 0:
            assert self._log is not None
            table.mapped.is_written = True  # first: an entry that is there, and said not to be, would not be taken back
            self._log.append(table.mapped.records(table.number), new)
            table.is_logged.set(new)

    def before_forgetting(self, moments: Moments, rows: Tensor) -> None:
        """Have in the log what ``moments.forget(rows)`` will write.

        Raises:
            OSError: the disk has no room.
        """
        slots = _slots_of(moments, rows)
        if moments.layout.owes_decay or moments.layout.replays:
            self._make_slots(moments, rows)
            self._log_slots(moments, slots)
            return
        last = torch.arange(moments.num_slots - len(slots), moments.num_slots, device=moments.device)
        self._log_slots(moments, torch.unique(torch.cat([slots, last])))

    def _log_slots(self, moments: Moments, slots: Tensor) -> None:
        """Have what slots hold in the log; those that the last commit does not have need not be there.

        Args:
            moments: whose they are.
            slots: int64, distinct.

        Raises:
            OSError: the disk has no room.
        """
        memory = _memory_of(moments)
        slots = slots[slots < memory.num_committed]
        new = slots[~memory.is_logged.are_set(slots)]
        if len(new) > 0:
            assert self._log is not None
            self._log.append(memory.records(), new)
            memory.is_logged.set(new)

    def _holds(self, moments: Moments) -> bool:
        memory = moments.memory
        return isinstance(memory, FileMemory) and os.path.dirname(memory.directory) == self.path

    def _listed(self, mapped: MappedTable) -> _Table:
        """Return what is kept of a table, which came with a parameter when the optimizer was built or got its group."""
        listed = self._tables.get(mapped.id)
        if listed is None or listed.mapped is not mapped:
            raise _validate.unknown_table_error(mapped.path)
        if not listed.is_pending and not mapped.is_paired_with(self._id):
            raise _validate.taken_table_error(mapped.path, self.path)
        return listed

    def _table_of(self, parameter: Tensor) -> _Table | None:
        """Return what is kept of a table, or None of one in memory; refuse a parameter that got other memory."""
        mapped = mapped_table.find(parameter)
        listed = None if mapped is None else self._listed(mapped)
        found = None if mapped is None else mapped.id
        wanted = self._table_ids.get(id(parameter), found)
        if found != wanted:
            raise _validate.replaced_memory_error(
                None if wanted is None else self._tables[wanted].mapped.path, None if mapped is None else mapped.path
            )
        return listed

    def _new_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def _file_memory(
        self, number: int, shape: torch.Size, sparse_dim: int, dtype: torch.dtype, layout: StateLayout, num_slots: int
    ) -> FileMemory:
        directory = self._moments_path(number)
        parts = layout.parts(shape[sparse_dim:], dtype)
        try:
            return FileMemory(directory, number, math.prod(shape[:sparse_dim]), parts, num_slots)
        except FileNotFoundError as error:
            raise _validate.missing_part_error(self.path, str(error.filename)) from None

    # Committing ------------------------------------------------------------------------------------------------------

    def commit(self, kept: Sequence[Kept]) -> None:
        """Make what is kept now the state that opening the directory comes back to.

        All of it is on the disk before ``commit.json`` is replaced, which is the moment of the commit; the log is empty
        after.

        Raises:
            RuntimeError: a parameter that has been given other memory, or a table that is committed elsewhere since.
            OSError: the disk could not take it. The commit before stands, and the log goes on, unless ``commit.json``
                has been replaced already.
        """
        tables = [self._table_of(each.parameter) for each in kept]
        # Those of a group that was taken out are committed no more.
        self._tables = {table.mapped.id: table for table in tables if table is not None}
        for table in self._tables.values():
            table.mapped.sync()
        memories = _memories(kept)
        for memory, _ in memories:
            memory.sync()
            with naming(memory.directory):
                sync_directory(memory.directory)
        number = self._commit + 1
        self._write_values(number, kept)
        # From here on what is written belongs to one commit or the other, and what is logged must belong to the same.
        with _interrupts.held():
            self._replace_commit(number, kept)
        self._sweep(kept)

    def _replace_commit(self, number: int, kept: Sequence[Kept]) -> None:
        # Names in a directory are on the disk in the order they were made: that of commit.json comes last.
        log = UndoLog(self.path, number)
        try:
            # What there may be no memory for comes before the commit, too.
            notes = [table.commit() for table in self._tables.values()]
            notes += [memory.commit(moments.num_slots) for memory, moments in _memories(kept)]
            write_commit(self.path, self._describe(number, kept))
        finally:  # what follows the replacement may fail, and what was committed stays so
            content = read_commit(self.path)
            if content is not None and content["commit"] == number:
                self._enter(number, log, notes)
            else:
                log.close()

    def _enter(self, number: int, log: UndoLog, notes: Sequence[Callable[[], None]]) -> None:
        self._commit = number
        if self._log is not None:
            self._log.close()
        self._log = log
        for note in notes:
            note()

    def _write_values(self, number: int, kept: Sequence[Kept]) -> None:
        """Save what is kept in memory."""
        values: dict[str, dict[int, Any]] = {"parameters": {}, "states": {}, "histories": {}}
        for index, each in enumerate(kept):
            if mapped_table.find(each.parameter) is None:
                value = each.parameter.detach()
                is_part = value.numel() * value.itemsize < value.untyped_storage().nbytes()
                values["parameters"][index] = value.clone() if is_part else value
            if isinstance(each.state, Moments):
                history = each.state.history
                if history is not None:
                    values["histories"][index] = {"base": history.base, "numbers": history.numbers()}
            elif each.state is not None:
                values["states"][index] = dict(each.state)
        path = self._values_path(number)
        try:
            with open(path, "wb") as file:
                torch.save(values, file)
                file.flush()
                os.fsync(file.fileno())
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch has an error of its own for a disk that takes less than it gets
            raise _validate.file_error(path, "could not be written", error) from None

    def _describe(self, number: int, kept: Sequence[Kept]) -> dict[str, Any]:
        groups = {each.place.group_index: each.place.group for each in kept}
        return {
            "id": self._id,
            "commit": number,
            "next_number": self._next_number,
            "seeds": [groups[index].get(SEED) for index in sorted(groups)],
            "parameters": [self._describe_parameter(each) for each in kept],
        }

    def _describe_parameter(self, each: Kept) -> dict[str, Any]:
        listed = self._table_of(each.parameter)
        table = None
        if listed is not None:
            path = os.path.realpath(listed.mapped.path)
            table = {"number": listed.number, "id": listed.mapped.id, "path": path, "is_pending": listed.is_pending}
        moments = None
        if isinstance(each.state, Moments):
            moments = {
                "number": _memory_of(each.state).number,
                "sparse_dim": each.state.sparse_dim,
                "layout": _write_layout(each.state.layout),
                **{name: getattr(each.state, name) for name in _COUNTERS},
            }
        return {
            "group": each.place.group_index,
            "position": each.place.position,
            "shape": list(each.parameter.shape),
            "dtype": str(each.parameter.dtype),
            "table": table,
            "moments": moments,
        }

    def _sweep(self, kept: Sequence[Kept]) -> None:
        """Remove our files that the commit does not name; what cannot be removed now, the next commit removes."""
        named = {COMMIT_FILE, *(os.path.basename(memory.directory) for memory, _ in _memories(kept))}
        named |= {
            os.path.basename(path) for path in (log_path(self.path, self._commit), self._values_path(self._commit))
        }
        names: list[str] = []
        with suppress(OSError):
            names = os.listdir(self.path)
        for name in names:
            if name not in named and _OUR_NAMES.fullmatch(name):
                path = os.path.join(self.path, name)
                if os.path.isdir(path):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        os.unlink(path)

    def _moments_path(self, number: int) -> str:
        return os.path.join(self.path, f"moments-{number}")

    def _values_path(self, commit: int) -> str:
        return os.path.join(self.path, f"values-{commit}.pt")


def _memories(kept: Iterable[Kept]) -> list[tuple[FileMemory, Moments]]:
    """Return the moments among what is kept, with their files."""
    return [(_memory_of(each.state), each.state) for each in kept if isinstance(each.state, Moments)]


def _memory_of(moments: Moments) -> FileMemory:
    memory = moments.memory
    assert isinstance(memory, FileMemory), "moments are put into files before they are written or committed"
    return memory


def _slots_of(moments: Moments, rows: Tensor) -> Tensor:
    slots = moments.slot_of_row[rows].to(torch.int64) - 1
    return slots[slots >= 0]


def _write_layout(layout: StateLayout) -> dict[str, Any]:
    stored = layout.stored_dtype
    return {**layout._asdict(), "stored_dtype": None if stored is None else str(stored).removeprefix("torch.")}


def _read_layout(saved: Mapping[str, Any]) -> StateLayout:
    stored = saved["stored_dtype"]
    return StateLayout(**{**saved, "stored_dtype": None if stored is None else getattr(torch, stored)})
