"""The rule in C++ on the CPU: one call for all tables of a step.

This is the only caller of the native module, which takes addresses: here it is made sure that what stands at them is
what it updates in place: strided CPU memory of a dtype it knows, each row's elements adjacent, contiguous lookups
(the optimizer gives no others), and room for every slot that the step can need.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor
from torch._C import DispatchKey

from .. import _validate
from .._huge_pages import move_into_huge_pages
from .._validate import GroupOptions, Place
from ..moments import Moments, NativeTable, StateLayout, moment_dtype
from ._in_place import memory_refusal, report_writes, row_stride
from ._types import RowsRead, RowUpdate

# Rows and lookups up to here always fit the native index type; beyond, the module is asked.
_ALWAYS_FITS = 2**31


@cache
def _load() -> tuple[ModuleType | None, str]:
    """Return the native module, or None and what went wrong."""
    try:
        return importlib.import_module("sparseadam._native"), ""
    except ImportError as error:
        return None, str(error)


def module() -> ModuleType | None:
    """Return the native module, or None where this installation lacks it."""
    return _load()[0]


def missing_reason() -> str | None:
    """Say why the native backend is missing, or None where it is there."""
    native, problem = _load()
    if native is not None:
        return None
    return (
        f"the native module is missing from this installation ({problem}). Install a C++17 compiler and build "
        "it anew: pip install --force-reinstall --no-deps . in a checkout of sparseadam"
    )


def detail() -> str:
    """Say what this build runs on."""
    return f"C++ on the CPU, {instruction_set()}"


@cache
def instruction_set() -> str:
    """Return the fastest instruction set at hand."""
    return str(_module().instruction_sets()[-1])


def prepare(update: RowUpdate) -> str | None:
    """Make a table ready for ``update_rows``: room for its new slots, and the module's handle of its memory.

    Returns:
        Why this table's step cannot run natively, or None where it can.
    """
    moments, num_lookups = update.moments, update.num_lookups
    if (num_lookups >= _ALWAYS_FITS or moments.num_rows >= _ALWAYS_FITS) and not _module().fits(
        moments.num_rows, num_lookups
    ):
        return f"{moments.num_rows} rows and {num_lookups} lookups do not fit its 64-bit (row, position) entries"
    if moments.capacity < moments.num_rows:
        moments.grow(moments.num_slots + num_lookups)
    reason = _table_refusal(update.table, moments)
    moments.native_table = None
    if reason is None:
        made_for = _made_for(update.table, update.place, update.stochastic_rounding)
        moments.native_table = NativeTable(_make_handle(update), made_for)
        _settle_in_huge_pages(update.table, moments)
    return reason


def _settle_in_huge_pages(table: Tensor, moments: Moments) -> None:
    """Have a table's memory moved into huge pages, once for each memory that it has.

    On a two-core Xeon a native step then took 11 % less time for 4,096 Zipf lookups into 1,000,000 x 64, 11 to 13 % for
    65,536 into 10,000,000 x 64, and 10 % for 2,048 into each of 26 tables of 100,000 x 16.
    """
    address = table.data_ptr()
    if moments.settled_table == address:
        return
    moments.settled_table = address
    num_elements = 1 + sum((size - 1) * stride for size, stride in zip(table.shape, table.stride(), strict=True))
    move_into_huge_pages(address, num_elements * table.itemsize)


def refusal(read: RowsRead) -> str | None:
    """Say why rows of a table cannot catch up natively, or return None where they can."""
    num_rows_read = len(read.rows)
    if not _module().fits(read.moments.num_rows, num_rows_read):
        return f"{read.moments.num_rows} rows, of which {num_rows_read} are read, do not fit its 64-bit entries"
    return None if _has_handle(read) else _table_refusal(read.table, read.moments)


def _table_refusal(table: Tensor, moments: Moments) -> str | None:
    if table.device.type != "cpu":
        return f"it runs on the CPU, and the table is on {table.device}"
    if _element_type(table.dtype) not in _module().element_types():
        return f"this build has no {table.dtype} kernel"
    return memory_refusal(table, moments)


def update_rows(updates: Sequence[RowUpdate]) -> None:
    """Update the touched rows of all tables, each of them prepared, and their moments in place, or none of them.

    Raises:
        IndexError: an index outside its table, named; nothing was written.
        RuntimeError: a gradient that is not finite where that is refused; nothing was written.
    """
    steps = [
        (
            _handle_of(update.moments),
            update.indices.data_ptr(),
            update.values.data_ptr(),
            update.num_lookups,
            update.scalars,
            update.moments.counter_addresses,
            _history_tuple(update.moments),
        )
        for update in updates
    ]
    fault = _module().step(steps, instruction_set(), torch.get_num_threads())
    if fault is not None:
        table_index, bad_index, refused_rows, are_behind = fault
        update = updates[table_index]
        if bad_index is None:
            error = _validate.behind_error if are_behind else _validate.nonfinite_error
            raise error(update.place, update.moments.names_of(torch.tensor(refused_rows, device="cpu")).tolist())
        raise _validate.row_error(update.place, update.table.shape[: update.moments.sparse_dim], *bad_index)
    report_writes([update.table for update in updates if update.num_lookups > 0])


def catch_up(read: RowsRead) -> None:
    """Do as ``reference.catch_up`` does, for a table that is not refused, in one pass whatever its rows have missed."""
    moments, history = read.moments, read.moments.history
    assert history is not None, "only where missed steps are replayed"
    if history.log_decay != 0.0:  # rows without a slot may get one
        moments.grow(moments.num_slots + len(read.rows))
    is_done = _module().catch_up(
        table=_handle_of(moments) if _has_handle(read) else _make_handle(read),
        rows=read.rows.data_ptr(),
        num_rows_read=len(read.rows),
        counters=moments.counter_addresses,
        history=_history_tuple(moments),
        seed=read.seed,
        instruction_set=instruction_set(),
        num_threads=torch.get_num_threads(),
    )
    if not is_done:
        raise _validate.row_range_error(read.rows, moments.num_rows, read.place)


def _history_tuple(moments: Moments) -> tuple[int, int, int, object]:
    history = moments.history
    if history is None:
        return 0, 0, 0, None
    if history.native_cache is None:
        history.native_cache = _module().HistoryCache()
    return history.address, history.base, history.num_steps, history.native_cache


def coalesce_rows(
    indices: Tensor, values: Tensor, sparse_shape: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Do as ``reference.coalesce_rows`` does, for lookups inside their table that ``can_coalesce``."""
    indices, values = indices.contiguous(), values.contiguous()
    width = math.prod(values.shape[1:])
    num_threads = torch.get_num_threads()
    coalescing = _module().Coalescing(
        indices=indices.data_ptr(),
        sparse_shape=list(sparse_shape),
        num_lookups=indices.shape[1],
        num_threads=num_threads,
    )
    assert not coalescing.has_bad_index, "indices are checked before"
    rows = torch.empty(coalescing.num_touched, dtype=torch.int64, device="cpu")
    sums = torch.empty((coalescing.num_touched, *values.shape[1:]), dtype=dtype, device="cpu")
    coalescing.sum(
        values=values.data_ptr(),
        width=width,
        element_type=_element_type(values.dtype),
        instruction_set=instruction_set(),
        rows=rows.data_ptr(),
        sums=sums.data_ptr(),
        num_threads=num_threads,
    )
    return rows, sums


def initial_values(distribution: str, scale: float, seed: int, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return the values of ``rows``, int64 and contiguous, that ``initial.py`` describes, in float32 or float64."""
    values = torch.empty((len(rows), width), dtype=dtype, device="cpu")
    _module().initial_values(
        distribution=distribution,
        scale=scale,
        seed=seed,
        rows=rows.data_ptr(),
        num_rows=len(rows),
        width=width,
        element_type=_element_type(dtype),
        values=values.data_ptr(),
    )
    return values


def can_coalesce(indices: Tensor, values: Tensor, sparse_shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether native code can sum these lookups in ``dtype``."""
    return (
        values.device.type == "cpu"
        and _element_type(values.dtype) in _module().element_types()
        and dtype is moment_dtype(values.dtype)
        and _module().fits(math.prod(sparse_shape), indices.shape[1])
    )


class Replaying(NamedTuple):
    """A table whose missed steps are replayed."""

    table: Tensor
    moments: Moments
    place: Place


class SteadyStep:
    """The tables of a step just taken, read by native code in the next one while all of them look the same.

    Only what may differ without a check is read anew: gradients, their entries, counters, histories and the groups'
    numbers.
    """

    def __init__(self, native_step: Any, replaying: list[Replaying]) -> None:
        """Wrap the module's listing; ``list_tables`` makes it."""
        self._native_step = native_step
        # Of the listed tables those whose missed steps are replayed.
        self.replaying = replaying

    def remember_options(self, groups: list[dict[str, Any]]) -> None:
        """Take note of what the groups' options are."""
        self._native_step.remember_options(groups)

    def are_options_as_before(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the groups' options are the very objects that were remembered, none of which can change in place."""
        return cast("bool", self._native_step.are_options_as_before(groups))

    def run(self, state: dict[Any, Any], groups: list[Any], scalars_at: list[Any]) -> list[Tensor | None] | None:
        """Step every table that has a gradient, counters included, having looked at the dense parameters, too.

        Args:
            state: the optimizer's state.
            groups: the parameters of each group.
            scalars_at: for each group, the ``StepScalars`` of a step, which histories of missed steps are given too.

        Returns:
            The gradients of the dense parameters as listed, which are the caller's to step, with None for those that
            have none. None if it could not: then nothing was written, and the general step will find out why.
        """
        if self.replaying:  # native code and histories are given the same ones
            scalars_at = [cache(each) for each in scalars_at]
        # A gradient's entries are only looked at here, and autograd's views of them are not needed: without those a
        # further table takes 1.4 us in place of 1.9, of which 0.25 come back where the gradient is freed.
        views = DispatchKey.ADInplaceOrView
        were_left_out = torch._C._dispatch_tls_is_dispatch_key_excluded(views)
        try:
            torch._C._dispatch_tls_set_dispatch_key_excluded(views, True)
            # What report_writes ends up calling, without a line of Python in which an interrupt could be raised.
            grads = self._native_step.run(
                state, groups, scalars_at, torch._C._increment_version, instruction_set(), torch.get_num_threads()
            )
        finally:
            torch._C._dispatch_tls_set_dispatch_key_excluded(views, were_left_out)
            self._note_steps(scalars_at)
        return cast("list[Tensor | None] | None", grads)

    def _note_steps(self, scalars_at: list[Any]) -> None:
        """Append the step to the histories of the tables that have taken it."""
        for _, moments, place in self.replaying:
            history = moments.history
            if history is not None and history.last_step < moments.step:
                history.append(scalars_at[place.group_index](moments.step))


def list_tables(
    groups: Sequence[dict[str, Any]],
    options: Sequence[GroupOptions],
    state: Mapping[Any, Any],
    dense: Collection[Tensor],
) -> SteadyStep | None:
    """List the parameters of a step just taken, or return None where the next one must go the general way as well.

    Moments that may have to grow do: it moves them. Of ``dense`` parameters the state is a dict of tensors. A table
    that has changed since its own last step, as only one can that had no gradient in this one, is not listed: its next
    step goes the general way.
    """
    steady = _module().steady_step(Tensor)
    if steady is None:
        return None
    replaying = []
    listed = [parameter for group in groups for parameter in group["params"]]
    if len(set(listed)) < len(listed):
        return None
    for group_index, group in enumerate(groups):
        steady.add_group()
        for position, parameter in enumerate(group["params"]):
            place = Place(group, group_index, position)
            moments = state.get(parameter)
            if parameter in dense:
                steady.add_dense(parameter, moments)
            elif _is_steady(moments, parameter, place, options[group_index]):
                replays = moments.history is not None
                steady.add_table(
                    parameter=parameter,
                    native_table=_handle_of(moments),
                    counters=moments.counter_addresses,
                    history_of=partial(_history_tuple, moments) if replays else None,
                )
                if replays:
                    replaying.append(Replaying(parameter, moments, place))
            elif parameter.grad is None:
                steady.add_idle(parameter)
            else:
                return None
    steady.remember_state(state)
    return SteadyStep(steady, replaying)


def _is_steady(moments: object, table: Tensor, place: Place, options: GroupOptions) -> TypeGuard[Moments]:
    """Whether a table's next step needs nothing of Python: what the native backend knows of it is so, and stays so."""
    return (
        type(moments) is Moments
        and moments.native_table is not None
        and moments.capacity >= moments.num_rows
        and moments.layout == options.layout
        and moments.native_table.made_for == _made_for(table, place, options.stochastic_rounding)
    )


def _handle_of(moments: Moments) -> object:
    assert moments.native_table is not None, "prepare makes it"
    return moments.native_table.handle


def _has_handle(read: RowsRead) -> bool:
    """Whether the handle of the table's last step is one for what it is now."""
    known = read.moments.native_table
    return known is not None and known.made_for == _made_for(read.table, read.place, read.stochastic_rounding)


def _made_for(table: Tensor, place: Place, stochastic_rounding: bool) -> tuple[Any, ...]:
    """Return what a handle of a table was made for, beside its moments, which drop it when they move."""
    looks = table.data_ptr(), table.device, table.dtype, table.shape, table.stride(), table.is_neg()
    return (*looks, place.stream, stochastic_rounding)


def _module() -> ModuleType:
    native = module()
    assert native is not None, "the native backend was chosen without its module"
    return native


def _element_type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _make_handle(update: RowUpdate | RowsRead) -> object:
    table, moments = update.table, update.moments
    parts = moments.whole_memory()
    return _module().Table(
        table=table.data_ptr(),
        table_stride=row_stride(table, moments),
        element_type=_element_type(table.dtype),
        sparse_shape=list(table.shape[: moments.sparse_dim]),
        width=moments.width,
        moments=_moment_memory(moments.layout, parts),
        slot_of_row=moments.slot_of_row.data_ptr(),
        wide_slots=moments.slot_of_row.dtype is torch.int64,
        rows=parts["rows"].data_ptr(),
        stochastic_rounding=update.stochastic_rounding,
        stream=update.place.stream,
        row_names=0 if moments.row_names is None else moments.row_names.data_ptr(),
    )


def _moment_memory(layout: StateLayout, parts: Mapping[str, Tensor]) -> object:
    def address(name: str) -> int:
        return parts[name].data_ptr() if name in parts else 0

    return _module().MomentMemory(
        type="own" if layout.stored_dtype is None else _element_type(layout.stored_dtype),
        one_exp_avg_sq_a_row=layout.one_exp_avg_sq_a_row,
        exp_avg=address("exp_avg"),
        exp_avg_sq=address("exp_avg_sq"),
        max_exp_avg_sq=address("max_exp_avg_sq"),
        exp_avg_stride=parts["exp_avg"].stride(0),
        exp_avg_sq_stride=parts["exp_avg_sq"].stride(0),
        exp_avg_scale=address("exp_avg_scale"),
        exp_avg_sq_scale=address("exp_avg_sq_scale"),
        scale_stride=parts["exp_avg_scale"].stride(0) if "exp_avg_scale" in parts else 0,
        row_steps=address("row_steps"),
        paid_log_decay=address("paid_log_decay"),
        moment_steps=address("moment_steps"),
        weight_steps=address("weight_steps"),
        clock_stride=parts["moment_steps"].stride(0) if "moment_steps" in parts else 0,
    )
