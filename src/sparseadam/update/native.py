"""The rule in C++ on the CPU: one call for all tables of a step.

This is the only caller of the native module, which takes addresses: here it is made sure that what stands at them is
what it updates in place: strided CPU memory of a dtype it knows, each row's elements adjacent, contiguous lookups
(``gradient.read_lookups`` gives no others), and room for every slot that the step can need.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .. import _validate
from ..moments import Moments
from ._types import RowUpdate

# Rows and lookups up to here always fit the native index type; beyond, the module is asked.
_ALWAYS_FITS = 2**31


@cache
def module() -> ModuleType | None:
    """Return the native module, or None where this installation lacks it."""
    try:
        return importlib.import_module("sparseadam._native")
    except ImportError:
        return None


def missing_reason() -> str | None:
    """Say why the native backend is missing, or None where it is there."""
    if module() is not None:
        return None
    return (
        "the native module is missing from this installation. Install a C++17 compiler and reinstall sparseadam "
        "(pip install --no-binary sparseadam --force-reinstall --no-deps sparseadam), or use a wheel for this platform"
    )


def detail() -> str:
    """Say what this build runs on."""
    native = _module()
    return f"{instruction_set()}, threads: {native.threads}"


@cache
def instruction_set() -> str:
    """Return the fastest instruction set at hand."""
    return str(_module().instruction_sets()[-1])


def refusal(update: RowUpdate) -> str | None:
    """Say why this table's step cannot run natively, or None where it can."""
    moments = update.moments
    num_lookups = update.lookups.indices.shape[1]
    if (num_lookups >= _ALWAYS_FITS or moments.num_rows >= _ALWAYS_FITS) and not _module().fits(
        moments.num_rows, num_lookups
    ):
        return f"{moments.num_rows} rows and {num_lookups} lookups do not fit its 64-bit (row, position) entries"
    if moments.native_table is not None and moments.native_table[0] == update.table.data_ptr():
        return None
    return _table_refusal(update.table, moments)


def _table_refusal(table: Tensor, moments: Moments) -> str | None:
    if table.device.type != "cpu":
        return f"it runs on the CPU, and the table is on {table.device}"
    if _element_type(table.dtype) not in _module().element_types():
        return f"this build has no {table.dtype} kernel"
    if _row_stride(table, moments) is None:
        return (
            f"its rows must be adjacent in memory, and the table has shape {list(table.shape)} with strides "
            f"{list(table.stride())}"
        )
    return None


def update_rows(updates: Sequence[RowUpdate]) -> None:
    """Update the touched rows of all tables and their moments in place, or none of them.

    Raises:
        IndexError: an index outside its table, named; nothing was written.
    """
    steps = [
        (
            _native_table(update.table, update.moments, len(update.lookups.values)),
            update.lookups.indices.data_ptr(),
            update.lookups.values.data_ptr(),
            len(update.lookups.values),
            update.moments.num_slots,
            update.scalars,
        )
        for update in updates
    ]
    num_slots, bad = _module().step(steps, instruction_set(), torch.get_num_threads())
    if bad is not None:
        table_index, _, dim, index = bad
        update = updates[table_index]
        sparse_shape = update.table.shape[: update.moments.sparse_dim]
        raise _validate.row_error(update.place, sparse_shape, dim, index)
    for update, count in zip(updates, num_slots, strict=True):
        update.moments.num_slots = count
    # Written past autograd: tell it, so that a stale graph is caught in backward() as after any in-place operation.
    torch.autograd.graph.increment_version([update.table for update in updates])


def _module() -> ModuleType:
    native = module()
    assert native is not None, "the native backend was chosen without its module"
    return native


def _element_type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _native_table(table: Tensor, moments: Moments, num_lookups: int) -> object:
    """Return the module's handle of a table, made once and again when its memory or that of its moments has moved."""
    if moments.capacity < moments.num_rows:
        moments.grow(moments.num_slots + num_lookups)
    address = table.data_ptr()
    if moments.native_table is None or moments.native_table[0] != address:
        rows, exp_avg, exp_avg_sq = moments.whole_memory()
        handle = _module().Table(
            table=address,
            table_stride=_row_stride(table, moments),
            element_type=_element_type(table.dtype),
            sparse_shape=list(table.shape[: moments.sparse_dim]),
            width=moments.width,
            exp_avg=exp_avg.data_ptr(),
            exp_avg_sq=exp_avg_sq.data_ptr(),
            moment_stride=exp_avg.stride(0),
            slot_of_row=moments.slot_of_row.data_ptr(),
            wide_slots=moments.slot_of_row.dtype is torch.int64,
            rows=rows.data_ptr(),
        )
        moments.native_table = (address, handle)
    return moments.native_table[1]


def _row_stride(table: Tensor, moments: Moments) -> int | None:
    """Return the distance from row to row in elements, or None where rows cannot be walked by one stride."""
    sparse_dim = moments.sparse_dim
    if table.is_contiguous():
        return moments.width
    if not _is_dense(table.shape[sparse_dim:], table.stride()[sparse_dim:], 1):
        return None
    stride = table.stride(sparse_dim - 1) if sparse_dim > 0 else moments.width
    return stride if _is_dense(table.shape[:sparse_dim], table.stride()[:sparse_dim], stride) else None


def _is_dense(shape: Sequence[int], strides: Sequence[int], innermost: int) -> bool:
    """Whether dimensions follow each other row-major, the last one in steps of ``innermost``."""
    expected = innermost
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
