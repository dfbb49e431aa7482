"""Compact moments of one table: a slot for each row that was ever touched.

``Moments`` is what ``optimizer.state[param]`` holds: a mapping of the state's parts by name, made from the memory below
it when asked for, so there is nothing to keep in step with it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import rounding
from ._device_counts import DeviceCounts
from ._memory import IndexedMemory, Part, SlotMemory, in_stretches, index_dtype, slot_memory, zeros
from .history import LOG_BETA1, LOG_BETA2, History

# Counted for the table as a whole; the last two are there only where their option is, or something was counted.
COUNTERS = ("step", "num_skipped", "log_decay")

# Of layouts that replay missed steps: up to which step a slot's moments, and its row's weights, have been brought.
CLOCKS = ("moment_steps", "weight_steps")
LARGEST_CLOCK = 2**31 - 1

# A pass over a whole table takes so many of its rows, or slots, at a time: what it makes of them stays small.
ROWS_AT_ONCE = 1 << 16

_EXP_AVGS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def moment_dtype(table_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a table's moments are computed: its own, or float32 for half-precision tables."""
    return torch.float64 if table_dtype is torch.float64 else torch.float32


class StateLayout(NamedTuple):
    """What is kept for each slot beside its row: which options shape the state.

    Attributes:
        stored_dtype: of the moments: ``torch.bfloat16``, ``torch.uint8`` (codes) or None for the dtype they are
            computed in.
        one_exp_avg_sq_a_row: keep one second moment a row, of the dtype in which moments are computed.
        amsgrad: keep the largest second moments.
        row_steps: count each row's touches.
        owes_decay: keep what weight decay each row has paid.
        replays: keep which steps each row has missed, which are replayed when it is next read.
    """

    stored_dtype: torch.dtype | None = None
    one_exp_avg_sq_a_row: bool = False
    amsgrad: bool = False
    row_steps: bool = False
    owes_decay: bool = False
    replays: bool = False

    def parts(self, row_shape: torch.Size, dtype: torch.dtype) -> dict[str, Part]:
        """Return the parts kept for each slot of a table whose moments are computed in ``dtype``."""
        stored = self.stored_dtype or dtype
        shape = tuple(row_shape)
        parts = {"rows": Part((), torch.int64, "rows"), "exp_avg": Part(shape, stored, "moments")}
        second = Part((), dtype, "second moments") if self.one_exp_avg_sq_a_row else Part(shape, stored, "moments")
        parts["exp_avg_sq"] = second
        if self.amsgrad:
            parts["max_exp_avg_sq"] = second
        if stored is torch.uint8:
            scale = Part((rounding.num_blocks(math.prod(shape)),), torch.float32, "scales")
            parts["exp_avg_scale"] = scale
            if not self.one_exp_avg_sq_a_row:
                parts["exp_avg_sq_scale"] = scale
        if self.row_steps:
            parts["row_steps"] = Part((), torch.int32, "row steps")
        if self.owes_decay:
            parts["paid_log_decay"] = Part((), torch.float64, "paid")
        if self.replays:
            parts.update((name, Part((), torch.int32, "clocks")) for name in CLOCKS)
        return parts

    @property
    def is_elementwise(self) -> bool:
        """Whether all that is kept belongs to single elements, so that rows can be cut and joined."""
        return self == StateLayout(self.stored_dtype, amsgrad=self.amsgrad) and self.stored_dtype is not torch.uint8


PLAIN = StateLayout()


class NativeTable(NamedTuple):
    """The native backend's handle of a table and its moments, and what it was made for beside these."""

    handle: object
    made_for: tuple[object, ...]


class Moments(MutableMapping[str, Any]):
    """The state of one table.

    Args:
        shape: the table's shape.
        sparse_dim: how many leading dimensions of it name a row; the table is viewed as ``[num_rows, width]``.
        dtype: dtype in which the moments are computed.
        device: where they are kept.
        layout: what is kept.
        memory: where they are kept, other than in memory that is made for them. What it holds is taken to be theirs
            once ``num_slots`` says so and ``index_rows()`` has been called.

    State:
        ``step`` (int): steps of the table so far. ``rows`` int64 ``[num_slots]``: the row of each slot, in the order
        of their first touch and, among rows first touched in one step, in row order (``forget`` moves the last slots
        into the places of those it takes). ``exp_avg`` and ``exp_avg_sq`` ``[num_slots, *row_shape]``. The others are
        there where ``layout`` says so: ``max_exp_avg_sq`` like ``exp_avg_sq``; ``exp_avg_scale`` and
        ``exp_avg_sq_scale`` float32 ``[num_slots, num_blocks]``; ``row_steps`` int32 ``[num_slots]``;
        ``paid_log_decay`` float64 ``[num_slots]``, of ``log_decay`` (float), which is what a row owes that has paid
        nothing; ``moment_steps`` and ``weight_steps`` int32 ``[num_slots]``, up to which step a slot's moments and its
        row's weights have been brought. ``num_skipped`` (int), once a row was skipped. The tensors are live views:
        writing to them writes the state.
    """

    __slots__ = (
        "_counters",
        "_device_counts",
        "_log_decay",
        "_memory",
        "device",
        "dtype",
        "history",
        "layout",
        "native_table",
        "num_rows",
        "row_names",
        "row_shape",
        "settled_table",
        "shape",
        "slot_of_row",
        "sparse_dim",
        "width",
    )

    def __init__(
        self,
        shape: torch.Size,
        sparse_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        layout: StateLayout = PLAIN,
        memory: IndexedMemory | None = None,
    ) -> None:
        """Start at step 0 with no slots."""
        self.shape = shape
        self.sparse_dim = sparse_dim
        self.dtype = dtype
        self.device = device
        self.layout = layout
        self.row_shape = shape[sparse_dim:]
        self.num_rows = math.prod(shape[:sparse_dim])
        self.width = math.prod(self.row_shape)
        # Where the native backend can move them on: step, num_slots and num_skipped; log_decay.
        self._counters = array("q", (0, 0, 0))
        self._log_decay = array("d", (0.0,))
        # Where steps count on the device, from which the two counters above are read when somebody asks.
        self._device_counts: DeviceCounts | None = None
        # Slot + 1 of each row and 0 where it has none, so that untouched pages of the index are never committed.
        if memory is None:
            self._memory = slot_memory(self.num_rows, layout.parts(self.row_shape, dtype), device)
            self.slot_of_row = zeros(self.num_rows, index_dtype(self.num_rows), device)
        else:
            self._memory, self.slot_of_row = memory, memory.index
        # The steps that rows may have missed, where they are replayed.
        self.history = History(0) if layout.replays else None
        # What each row is called in ``rows`` and to random bits; None where by its place, as in a whole table.
        self.row_names: Tensor | None = None
        # What the native backend made of the table and these moments in its last general step.
        self.native_table: NativeTable | None = None
        # The address of the table that the system was last asked to move into huge pages.
        self.settled_table = 0

    @property
    def step(self) -> int:
        """Steps of the table so far."""
        return self._counters[0]

    @step.setter
    def step(self, step: int) -> None:
        self._counters[0] = step

    @property
    def num_slots(self) -> int:
        """Slots in use."""
        self._read_device_counts()
        return self._counters[1]

    @num_slots.setter
    def num_slots(self, num_slots: int) -> None:
        self._take_counts_back()
        self._counters[1] = num_slots

    @property
    def num_skipped(self) -> int:
        """How often a row was left as it was because its gradient was not finite."""
        self._read_device_counts()
        return self._counters[2]

    @num_skipped.setter
    def num_skipped(self, num_skipped: int) -> None:
        self._take_counts_back()
        self._counters[2] = num_skipped

    @property
    def device_counts(self) -> DeviceCounts:
        """Slots in use and rows skipped as counters on the device, for steps that count there from now on."""
        if self._device_counts is None:
            self._device_counts = DeviceCounts(self._counters[1], self._counters[2], self.device)
        return self._device_counts

    def _read_device_counts(self) -> None:
        if self._device_counts is not None:
            self._counters[1], self._counters[2] = self._device_counts.read()

    def _take_counts_back(self) -> None:
        """Count on the host from now on."""
        self._read_device_counts()
        self._device_counts = None

    @property
    def log_decay(self) -> float:
        """Logarithm of the weight decay that a row owes that has paid nothing."""
        return self._log_decay[0]

    @log_decay.setter
    def log_decay(self, log_decay: float) -> None:
        self._log_decay[0] = log_decay

    @property
    def counter_addresses(self) -> tuple[int, int]:
        """Where three int64 (step, num_slots, num_skipped) and a double (log_decay) stand while these moments live."""
        self._take_counts_back()
        return self._counters.buffer_info()[0], self._log_decay.buffer_info()[0]

    @property
    def rows(self) -> Tensor:
        """The row of each slot, int64 ``[num_slots]``."""
        return self._memory.part("rows", self.num_slots)

    @property
    def num_bytes(self) -> int:
        """Bytes in use: all that is kept for the slots, and the index of all rows."""
        parts = self.layout.parts(self.row_shape, self.dtype).values()
        slot_bytes = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)
        history_bytes = 0 if self.history is None else self.history.num_bytes
        return self.num_slots * slot_bytes + self.num_rows * self.slot_of_row.dtype.itemsize + history_bytes

    @property
    def capacity(self) -> int:
        """Slots that fit without growing."""
        return self._memory.capacity

    @property
    def memory(self) -> SlotMemory:
        """What holds the slots."""
        return self._memory

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` slots, of which no table has more than it has rows."""
        num_slots = min(num_slots, self.num_rows)
        if num_slots > self._memory.capacity:
            self.native_table = None  # first: growing may fail when some of what it points at has moved
            self._memory.grow(num_slots)

    def make_room(self, num_lookups: int) -> None:
        """Make room for the rows of a step that counts them on the device, waiting for it only if there may be none."""
        if self.device_counts.most_slots() + num_lookups > self.capacity < self.num_rows:
            self.grow(self.num_slots + num_lookups)

    def slot_parts(self) -> dict[str, Tensor]:
        """Return what is kept for each slot, by name; those of one record share a storage."""
        return self.memory_of(self.num_slots)

    def parts(self) -> dict[str, Any]:
        """Return the state by the names of its parts."""
        slot_parts = self.slot_parts()
        return {key: slot_parts[key] if key in slot_parts else getattr(self, key) for key in self}

    def whole_memory(self) -> dict[str, Tensor]:
        """Return what is kept for every slot there is room for, by name."""
        return self.memory_of(self._memory.capacity)

    def memory_of(self, num_slots: int) -> dict[str, Tensor]:
        """Return what is kept for the first ``num_slots`` slots there is room for, used or not, by name."""
        return self._memory.all_parts(num_slots)

    @contextmanager
    def claimed_slots(self, rows: Tensor) -> Iterator[Tensor]:
        """Give the slot of each of ``rows`` (distinct, ascending, inside the table), new ones where needed.

        They are kept unless what they are for raises, which has written nothing then.
        """
        first = self.num_slots
        slots, new_rows = self._claim_slots(rows)
        try:
            yield slots
        except BaseException:
            self.rows[first:].zero_()
            self.slot_of_row.index_fill_(0, new_rows, 0)
            self.num_slots = first
            raise

    def _claim_slots(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots of rows, and which of these had none before."""
        slots = self.slot_of_row[rows].to(torch.int64) - 1
        is_new = slots < 0
        new_rows = rows[is_new]
        first, num_slots = self.num_slots, self.num_slots + len(new_rows)
        self.grow(num_slots)
        # Whatever takes memory comes before the first change: there may be none left.
        new_slots = torch.arange(first, num_slots, device=self.device)
        names, index = self.names_of(new_rows), (new_slots + 1).to(self.slot_of_row.dtype)
        slots[is_new] = new_slots
        self.num_slots = num_slots
        self.slot_of_row[new_rows] = index
        self.rows[first:] = names
        return slots, new_rows

    def names_of(self, rows: Tensor) -> Tensor:
        """Return what rows are called in ``rows`` and to random bits."""
        return rows if self.row_names is None else self.row_names[rows]

    def of_rows(self, rows: Tensor) -> Moments:
        """Return the same state for a table of some rows of this one's alone, for a step on a copy of them.

        Memory and counters are shared. ``take_slots`` ends it.

        Args:
            rows: int64 ``[num_touched]``, distinct and inside the table.
        """
        self._take_counts_back()
        self.grow(self.num_slots + len(rows))
        part = Moments.__new__(Moments)
        for name in Moments.__slots__:
            setattr(part, name, getattr(self, name))
        part.shape, part.sparse_dim, part.num_rows = torch.Size((len(rows), *self.row_shape)), 1, len(rows)
        part.slot_of_row, part.row_names = self.slot_of_row[rows], rows
        self.native_table = part.native_table = None
        return part

    def take_slots(self, part: Moments) -> None:
        """Take over the slots that new rows of ``part`` were given, which ``of_rows`` returned."""
        self.slot_of_row[part.row_names] = part.slot_of_row

    def fill(self, parts: Mapping[str, Any], history: History | None = None) -> None:
        """Take over a saved state; rows keep their order. Only for moments that have no slots yet.

        Without a history of missed steps no row has missed any.
        """
        for name in COUNTERS:
            if name in parts:
                setattr(self, name, parts[name])
        self.num_slots = len(parts["rows"])
        self.grow(self.num_slots)
        if self.layout.replays:
            self.history = History(self.step) if history is None else history.copy()
        for name, part in self.slot_parts().items():
            if name in CLOCKS and history is None:
                part.fill_(self.step)
            else:
                part.copy_(parts[name])
        self.index_rows()

    def index_rows(self) -> None:
        """Make the index of what ``rows`` says."""
        for begin in range(0, self.num_slots, ROWS_AT_ONCE):
            rows = self.rows[begin : begin + ROWS_AT_ONCE]
            slots = torch.arange(begin + 1, begin + 1 + len(rows), device=self.device)
            self.slot_of_row[rows] = slots.to(self.slot_of_row.dtype)

    def moved(self, device: torch.device, memory: IndexedMemory | None = None) -> Moments:
        """Return the same state on another device or in other memory."""
        moved = Moments(self.shape, self.sparse_dim, self.dtype, device, self.layout, memory)
        moved.fill(self.parts(), self.history)
        return moved

    def resized(self, shape: torch.Size) -> Moments:
        """Return the same state for a table of more or fewer leading entries; rows beyond its end are left out.

        Rows have paid what they owed and are up to date.
        """
        changed = Moments(shape, self.sparse_dim, self.dtype, self.device, self.layout)
        is_kept = self.rows < changed.num_rows
        parts = self.parts()
        changed.fill({key: parts[key][is_kept] if isinstance(parts[key], Tensor) else parts[key] for key in parts})
        return changed

    def forget(self, rows: Tensor) -> None:
        """Take from ``rows`` (distinct, inside the table) all that is kept for them.

        A row that would then owe the weight decay of steps before keeps its slot, with all else zero.
        """
        slots = self.slot_of_row[rows].to(torch.int64) - 1
        if self.layout.owes_decay or self.layout.replays:
            claimed, _ = self._claim_slots(rows.sort().values)
            self._clear(claimed)
            return
        self._give_back(slots[slots >= 0])

    def _clear(self, slots: Tensor) -> None:
        not_zero = {"paid_log_decay": self.log_decay, **dict.fromkeys(CLOCKS, self.step)}
        self.put(slots, {name: not_zero.get(name, 0) for name in self.slot_parts() if name != "rows"})

    def _give_back(self, slots: Tensor) -> None:
        """Move the last slots to the places of those given back, whose memory is zero afterwards, as new slots' is."""
        num_left = self.num_slots - len(slots)
        tail = torch.arange(num_left, self.num_slots, device=self.device)
        movers, holes = tail[~torch.isin(tail, slots)], slots[slots < num_left]
        parts = self.slot_parts().values()
        # Whatever takes memory comes before the first change, as there may be none left: a row without a slot whose
        # slot is not free would get another one, of which there are no more than rows.
        forgotten, moved = self.rows[slots], self.rows[movers]
        index = (holes + 1).to(self.slot_of_row.dtype)
        on_the_way = [torch.empty_like(part[: min(len(movers), ROWS_AT_ONCE)]) for part in parts]
        for part, scratch in zip(parts, on_the_way, strict=True):
            pieces = zip(torch.split(movers, ROWS_AT_ONCE), torch.split(holes, ROWS_AT_ONCE), strict=True)
            for leaving, taken in pieces:
                carried = torch.index_select(part, 0, leaving, out=scratch[: len(leaving)])
                part.index_copy_(0, taken, carried)
            part[num_left:].zero_()
        self.slot_of_row.index_fill_(0, forgotten, 0)
        self.slot_of_row.index_copy_(0, moved, index)
        self.num_slots = num_left

    def with_sparse_dim(self, sparse_dim: int) -> Moments:
        """Return the same state for gradients of another ``sparse_dim``, whose rows are larger or smaller.

        A row that becomes part of a larger one brings its moments; the others of the larger row's moments are zero,
        which is what never having been touched means. Only without slots, or where all that is kept belongs to single
        elements.
        """
        changed = Moments(self.shape, sparse_dim, self.dtype, self.device, self.layout)
        changed.step, changed.num_skipped, changed.log_decay = self.step, self.num_skipped, self.log_decay
        changed.history = self.history
        if self.num_slots == 0:
            return changed
        names = [name for name in _EXP_AVGS if name in self]
        if sparse_dim > self.sparse_dim:
            parts = changed.num_rows // max(self.num_rows, 1)
            offsets = torch.arange(parts, device=self.device)
            rows = (self.rows[:, None] * parts + offsets).flatten()
            shape = (len(rows), *changed.row_shape)
            cut = {name: self[name].reshape(shape) for name in names}
            changed.fill({"rows": rows, **cut})
            return changed
        parts = self.num_rows // max(changed.num_rows, 1)
        whole = self.rows // max(parts, 1)
        changed._claim_slots(torch.unique(whole))
        slots = changed.slot_of_row[whole].to(torch.int64) - 1
        part_shape = (changed.num_slots, parts, *self.row_shape)
        for name in names:
            target: Tensor = changed[name]
            filled = torch.zeros(part_shape, dtype=target.dtype, device=self.device)
            filled[slots, self.rows % max(parts, 1)] = self[name]
            target.copy_(filled.reshape(target.shape))
        return changed

    def are_behind(self, slots: Tensor) -> Tensor:
        """Return which of some slots' rows have weights that have yet to take a step."""
        weight_steps: Tensor = self["weight_steps"]
        return weight_steps[slots] < self.step

    def settle(self) -> None:
        """Count missed steps into all moments, once all rows' weights are up to date: a new history begins."""

        def settle_slots(begin: int, end: int) -> None:
            slots = torch.arange(begin, end, device=self.device)
            factors = [self.as_rows(factor) for factor in self.missed_factors(slots, self.step)]
            for name, factor in zip(("exp_avg", "exp_avg_sq"), factors, strict=True):
                self[name][begin:end].mul_(factor)
            for name in CLOCKS:
                self[name][begin:end].fill_(self.step)

        history = History(self.step)
        in_stretches(settle_slots, self.num_slots, ROWS_AT_ONCE)
        self.history = history

    def missed_factors(self, slots: Tensor, steps: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return what the first and second moments of slots are to be multiplied by, to be those at ``steps``.

        float64 ``[len(slots)]`` both: products of the betas of the steps since the moments were written.
        """
        assert self.history is not None, "only where missed steps are replayed"
        base = self.history.base
        logs = self.history.numbers()[:, [LOG_BETA1, LOG_BETA2]].to(self.device)
        # A slot that is new has a clock of zero, and moments of zero, which any factor will do for.
        written = (self["moment_steps"][slots].to(torch.int64) - base).clamp(min=0)
        factors = (logs[steps - base] - logs[written]).exp()
        return factors[:, 0], factors[:, 1]

    def as_rows(self, values: Tensor) -> Tensor:
        """Give a value of each slot, in the dtype in which moments are computed, the dimensions of rows."""
        return values.to(self.dtype).reshape(-1, *(1,) * len(self.row_shape))

    def read(self, name: str, slots: Tensor) -> Tensor:
        """Return a moment of some slots in the dtype in which moments are computed, ``[len(slots), *row_shape]``.

        One second moment a row has the shape ``[len(slots)]``. Steps that were missed are counted in.
        """
        stored: Tensor = self[name][slots]
        if self.layout.replays:
            return stored * self.as_rows(self.missed_factors(slots, self.step)[_EXP_AVGS.index(name)])
        if stored.dtype is not torch.uint8:
            return stored.to(self.dtype)
        decode = rounding.decode_exp_avg if name == "exp_avg" else rounding.decode_exp_avg_sq
        flat = stored.reshape(len(slots), self.width)
        return decode(flat, self[f"{name}_scale"][slots]).to(self.dtype).reshape(stored.shape)

    def encoded(self, name: str, values: Tensor, random: Tensor | None) -> dict[str, Tensor]:
        """Return what is stored of a moment of some slots, for ``put``: the parts of the state, by name.

        Moments of fewer bits are rounded by ``random``, int64 ``[num_slots, width]``.
        """
        dtype = self[name].dtype
        if dtype is values.dtype:
            return {name: values}
        assert random is not None, "moments of fewer bits are stored by stochastic rounding"
        flat = values.reshape(len(values), self.width)
        if dtype is not torch.uint8:
            return {name: rounding.round_stochastically(flat, random, dtype).reshape(values.shape)}
        encode = rounding.encode_exp_avg if name == "exp_avg" else rounding.encode_exp_avg_sq
        codes, scale = encode(flat, random)
        return {name: codes.reshape(values.shape), f"{name}_scale": scale}

    def put(self, slots: Tensor, parts: Mapping[str, Tensor | float]) -> None:
        """Write parts of the state of some slots, which needs no memory: rows of a tensor each, or a number for all."""
        for name, value in parts.items():
            if isinstance(value, Tensor):
                self[name].index_copy_(0, slots, value)
            else:
                self[name].index_fill_(0, slots, value)

    def to_dense(self) -> dict[str, Tensor]:
        """Return the moments by name as dense tensors of the table's shape, zero where no row was touched."""
        dense = {}
        slots = torch.arange(self.num_slots, device=self.device)
        for name in _EXP_AVGS:
            if name not in self:
                continue
            table = torch.zeros((self.num_rows, *self.row_shape), dtype=self.dtype, device=self.device)
            values = self.read(name, slots)
            missing_dims = table.dim() - values.dim()  # where there is one second moment a row
            table[self.rows] = values.reshape(*values.shape, *(1,) * missing_dims)
            dense[name] = table.reshape(self.shape)
        return dense

    def __getitem__(self, key: str) -> Any:
        """Return a part of the state by its name in checkpoints."""
        if key not in tuple(self):
            raise KeyError(key)
        return getattr(self, key) if key in COUNTERS else self._memory.part(key, self.num_slots)

    def __setitem__(self, key: str, value: Any) -> None:
        """Write a part of the state in place; its shape stays, and so do the rows.

        Code that walks an optimizer's state and puts each tensor back (``state[k] = v.to(device)``) thereby works.
        """
        if key in COUNTERS:
            if key != "log_decay" and not 0 <= value < 2**62:
                raise ValueError(f"{key} must be at least 0, and less than 2**62, got {value}.")
            if key == "step" and self.history is not None and value != self.step:
                raise ValueError(
                    f"step is {self.step} and cannot be set to {value}: with missed_steps='replay' the steps that rows "
                    "have taken are counted from it. Use load_state_dict() to replace a state, or call flush() and "
                    "delete optimizer.state[param] to start it anew."
                )
            setattr(self, key, float(value) if key == "log_decay" else int(value))
            return
        current: Tensor = self[key]
        if value.shape != current.shape:
            raise ValueError(
                f"{key} has shape {list(current.shape)}, got {list(value.shape)}. "
                "Use load_state_dict() to replace a state."
            )
        if key == "rows" and not torch.equal(value.to(current.device), current):
            raise ValueError("rows cannot be reassigned. Use load_state_dict() to replace a state.")
        current.copy_(value)

    def __delitem__(self, key: str) -> None:
        """Refuse: a state has all of its parts."""
        raise TypeError(f"{key} cannot be removed. Delete optimizer.state[param] to start it anew.")

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the parts."""
        yield "step"
        yield from self.layout.parts(self.row_shape, self.dtype)
        if self.layout.owes_decay:
            yield "log_decay"
        if self.num_skipped > 0:
            yield "num_skipped"

    def __len__(self) -> int:
        """Return how many parts there are."""
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        """Show what is held without printing it."""
        return (
            f"Moments(step={self.step}, touched {self.num_slots} of {self.num_rows} rows, "
            f"width={self.width}, dtype={self.dtype})"
        )

    def __reduce__(self) -> tuple[Callable[..., Moments], tuple[Any, ...]]:
        """Copy and pickle what is in use; the index is rebuilt."""
        parts = {key: part.contiguous() if isinstance(part, Tensor) else part for key, part in self.parts().items()}
        parts["rows"] = self.rows.clone()
        _keep_while_spawning(parts)
        return _rebuild, (self.shape, self.sparse_dim, self.dtype, self.device, self.layout, parts, self.history)


_kept_while_spawning: WeakKeyDictionary[object, list[Mapping[str, Any]]] = WeakKeyDictionary()


def _keep_while_spawning(parts: Mapping[str, Any]) -> None:
    """Have what is pickled for a process that is being spawned live until that has begun.

    PyTorch passes it the file descriptors of the tensors' memory, which are closed with the tensors: pickled ones are
    thought to belong to an object that the caller holds.
    """
    process = get_spawning_popen()
    if process is not None:
        _kept_while_spawning.setdefault(process, []).append(parts)


def _rebuild(
    shape: torch.Size,
    sparse_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    layout: StateLayout,
    parts: Mapping[str, Any],
    history: History | None,
) -> Moments:
    moments = Moments(shape, sparse_dim, dtype, device, layout)
    moments.fill(parts, history)
    return moments
