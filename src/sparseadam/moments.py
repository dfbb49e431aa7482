"""Compact moments of one table: a slot for each row that was ever touched.

``Moments`` is what ``optimizer.state[param]`` holds: a mapping with the keys ``step``, ``rows``, ``exp_avg`` and
``exp_avg_sq``, made from the memory below it when asked for, so there is nothing to keep in step with it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ._memory import moment_memory, zeros

STATE_KEYS = ("step", "rows", "exp_avg", "exp_avg_sq")


def moment_dtype(table_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a table's moments: its own, or float32 for half-precision tables."""
    return torch.float64 if table_dtype is torch.float64 else torch.float32


class Moments(MutableMapping[str, Any]):
    """The state of one table.

    Args:
        shape: the table's shape.
        sparse_dim: how many leading dimensions of it name a row; the table is viewed as ``[num_rows, width]``.
        dtype: dtype of the moments.
        device: where they are kept.

    State:
        ``step`` (int): steps of the table so far. ``rows`` int64 ``[num_slots]``: the row of each slot, in the order
        of their first touch and, among rows first touched in one step, in row order. ``exp_avg`` and ``exp_avg_sq``
        ``[num_slots, *row_shape]``. The tensors are live views: writing to them writes the moments.
    """

    __slots__ = (
        "_counters",
        "_memory",
        "device",
        "dtype",
        "native_table",
        "num_rows",
        "row_shape",
        "shape",
        "slot_of_row",
        "sparse_dim",
        "width",
    )

    def __init__(self, shape: torch.Size, sparse_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Start at step 0 with no slots."""
        self.shape = shape
        self.sparse_dim = sparse_dim
        self.dtype = dtype
        self.device = device
        self.row_shape = shape[sparse_dim:]
        self.num_rows = math.prod(shape[:sparse_dim])
        self.width = math.prod(self.row_shape)
        self._counters = array("q", (0, 0))  # step and num_slots, where the native backend can move them on
        self._memory = moment_memory(self.num_rows, self.row_shape, dtype, device)
        # Slot + 1 of each row and 0 where it has none, so that untouched pages of the index are never committed.
        slot_dtype = torch.int32 if self.num_rows < 2**31 else torch.int64
        self.slot_of_row = zeros(self.num_rows, slot_dtype, device)
        # What the native backend made of the table and these moments in its last general step.
        self.native_table: object | None = None

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
        return self._counters[1]

    @num_slots.setter
    def num_slots(self, num_slots: int) -> None:
        self._counters[1] = num_slots

    @property
    def counters_address(self) -> int:
        """Where ``step`` and ``num_slots`` stand, as two int64 in a row, for as long as these moments live."""
        return self._counters.buffer_info()[0]

    @property
    def rows(self) -> Tensor:
        """The row of each slot, int64 ``[num_slots]``."""
        return self._memory.rows(self.num_slots)

    @property
    def exp_avg(self) -> Tensor:
        """First moments, ``[num_slots, *row_shape]``."""
        return self._memory.moments(self.num_slots)[0]

    @property
    def exp_avg_sq(self) -> Tensor:
        """Second moments, ``[num_slots, *row_shape]``."""
        return self._memory.moments(self.num_slots)[1]

    @property
    def num_bytes(self) -> int:
        """Bytes in use: moments and row numbers of the slots, and the index of all rows."""
        slot_bytes = 2 * self.width * self.dtype.itemsize + torch.int64.itemsize
        return self.num_slots * slot_bytes + self.num_rows * self.slot_of_row.dtype.itemsize

    @property
    def capacity(self) -> int:
        """Slots that fit without growing."""
        return self._memory.capacity

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` slots, of which no table has more than it has rows."""
        num_slots = min(num_slots, self.num_rows)
        if num_slots > self._memory.capacity:
            self._memory.grow(num_slots)
            self.native_table = None

    def parts(self) -> dict[str, Any]:
        """Return the state by the names of its parts; the two moments share one storage where they lie in one."""
        exp_avg, exp_avg_sq = self._memory.moments(self.num_slots)
        return {"step": self.step, "rows": self.rows, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def whole_memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``rows``, ``exp_avg`` and ``exp_avg_sq`` of every slot there is room for."""
        capacity = self._memory.capacity
        return self._memory.rows(capacity), *self._memory.moments(capacity)

    def claim_slots(self, rows: Tensor) -> Tensor:
        """Return the slot of each of ``rows`` (distinct, ascending, inside the table), giving new ones where needed."""
        slots = self.slot_of_row[rows].to(torch.int64) - 1
        is_new = slots < 0
        new_rows = rows[is_new]
        first, self.num_slots = self.num_slots, self.num_slots + len(new_rows)
        self.grow(self.num_slots)
        new_slots = torch.arange(first, self.num_slots, device=self.device)
        slots[is_new] = new_slots
        self.slot_of_row[new_rows] = (new_slots + 1).to(self.slot_of_row.dtype)
        self.rows[first:] = new_rows
        return slots

    def fill(self, step: int, rows: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Take over a saved state; ``rows`` keep their order. Only for moments that have no slots yet."""
        self.step = step
        self.num_slots = len(rows)
        self.grow(self.num_slots)
        self.rows.copy_(rows)
        self.exp_avg.copy_(exp_avg)
        self.exp_avg_sq.copy_(exp_avg_sq)
        slots = torch.arange(1, self.num_slots + 1, device=self.device)
        self.slot_of_row[self.rows] = slots.to(self.slot_of_row.dtype)

    def to_device(self, device: torch.device) -> Moments:
        """Return the same state on another device."""
        moved = Moments(self.shape, self.sparse_dim, self.dtype, device)
        moved.fill(self.step, self.rows, self.exp_avg, self.exp_avg_sq)
        return moved

    def with_sparse_dim(self, sparse_dim: int) -> Moments:
        """Return the same state for gradients of another ``sparse_dim``, whose rows are larger or smaller.

        A row that becomes part of a larger one brings its moments; the others of the larger row's moments are zero,
        which is what never having been touched means.
        """
        changed = Moments(self.shape, sparse_dim, self.dtype, self.device)
        if sparse_dim > self.sparse_dim:
            parts = changed.num_rows // max(self.num_rows, 1)
            offsets = torch.arange(parts, device=self.device)
            rows = (self.rows[:, None] * parts + offsets).flatten()
            shape = (len(rows), *changed.row_shape)
            changed.fill(self.step, rows, self.exp_avg.reshape(shape), self.exp_avg_sq.reshape(shape))
            return changed
        parts = self.num_rows // max(changed.num_rows, 1)
        changed.step = self.step
        whole = self.rows // max(parts, 1)
        changed.claim_slots(torch.unique(whole))
        slots = changed.slot_of_row[whole].to(torch.int64) - 1
        part_shape = (changed.num_slots, parts, *self.row_shape)
        for name in ("exp_avg", "exp_avg_sq"):
            target: Tensor = getattr(changed, name)
            filled = torch.zeros(part_shape, dtype=self.dtype, device=self.device)
            filled[slots, self.rows % max(parts, 1)] = getattr(self, name)
            target.copy_(filled.reshape(target.shape))
        return changed

    def to_dense(self) -> tuple[Tensor, Tensor]:
        """Return both moments as dense tensors of the table's shape, zero where no row was touched."""
        dense = []
        for moment in (self.exp_avg, self.exp_avg_sq):
            table = torch.zeros((self.num_rows, *self.row_shape), dtype=self.dtype, device=self.device)
            table[self.rows] = moment
            dense.append(table.reshape(self.shape))
        return dense[0], dense[1]

    def __getitem__(self, key: str) -> Any:
        """Return a part of the state by its name in checkpoints."""
        if key not in STATE_KEYS:
            raise KeyError(key)
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        """Write a part of the state in place; its shape stays, and so do the rows.

        Code that walks an optimizer's state and puts each tensor back (``state[k] = v.to(device)``) thereby works.
        """
        if key == "step":
            self.step = int(value)
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
        return iter(STATE_KEYS)

    def __len__(self) -> int:
        """Return how many parts there are."""
        return len(STATE_KEYS)

    def __repr__(self) -> str:
        """Show what is held without printing it."""
        return (
            f"Moments(step={self.step}, touched {self.num_slots} of {self.num_rows} rows, "
            f"width={self.width}, dtype={self.dtype})"
        )

    def __reduce__(self) -> tuple[Callable[..., Moments], tuple[Any, ...]]:
        """Copy and pickle what is in use; the index is rebuilt."""
        parts = (
            self.step,
            self.rows.clone(),
            self.exp_avg.contiguous(),
            self.exp_avg_sq.contiguous(),
        )
        return _rebuild, (self.shape, self.sparse_dim, self.dtype, self.device, parts)


def _rebuild(
    shape: torch.Size,
    sparse_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    parts: tuple[int, Tensor, Tensor, Tensor],
) -> Moments:
    moments = Moments(shape, sparse_dim, dtype, device)
    moments.fill(*parts)
    return moments
