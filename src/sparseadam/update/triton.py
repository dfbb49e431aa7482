"""The rule in Triton, for tables on CUDA and ROCm devices: lookups sorted, rows listed and updated on the device.

A step of one table queues a stable sort of its lookups' rows, two prefix sums and three kernels
(``_triton_kernels.py``), and waits for nothing: how many rows are touched and how many of them are new stays on the
device. Triton itself is imported at the first need. With ``TRITON_INTERPRET=1`` set by then, its interpreter runs the
same kernels on CPU tensors, slowly: that is for checking them, and is never chosen unless named.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _validate, rounding
from ..moments import Moments, StateLayout
from . import reference
from ._in_place import memory_refusal, report_writes, row_stride
from ._types import NONFINITE, ROWS_NAMED, RowUpdate, layout_refusal

# Elements that a program has in hand at a time, and the widest block of them; both are powers of two. What they are on
# a GPU is a guess of which none has been timed. The interpreter takes its time for each operation, whatever its size.
_BLOCK_ELEMENTS = 512
_INTERPRETED_BLOCK_ELEMENTS = 1 << 17
_MAX_BLOCK_WIDTH = 512

# Contraction is off, so that the bits are those of the other backends.
COMPILE_OPTIONS = {"enable_fp_fusion": False}

# The oldest Triton that has compiled the kernels.
_OLDEST = (3, 6)


class TouchedRows(NamedTuple):
    """The lookups of a table's step, sorted by row, and the rows among them; all on the device.

    Attributes:
        update: what the step was asked for.
        sorted_rows: the row of each lookup, int64 ``[num_lookups]``, ascending.
        order: where each of them stood, int64 ``[num_lookups]``; a row's own lookups stay in their order.
        segments: touched rows up to each sorted lookup, its own included, int64 ``[num_lookups]``.
        begins: the first sorted lookup of each touched row, and after the last one the end, int64
            ``[num_lookups + 1]``; what follows is not set.
        is_new: whether each touched row gets a slot, int8 ``[num_lookups]``.
        is_finite: whether its gradient is, int8 ``[num_lookups]``; None where nobody asks.
    """

    update: RowUpdate
    sorted_rows: Tensor
    order: Tensor
    segments: Tensor
    begins: Tensor
    is_new: Tensor
    is_finite: Tensor | None


@cache
def _load() -> tuple[ModuleType | None, str]:
    """Return the module of kernels, or None and what went wrong."""
    try:
        version = importlib.import_module("triton").__version__
        if tuple(map(int, version.split(".")[:2])) < _OLDEST:
            return None, f"{version} was found, and {'.'.join(map(str, _OLDEST))} or later is needed"
        return importlib.import_module("sparseadam.update._triton_kernels"), ""
    except ImportError as error:
        return None, str(error)


def missing_reason() -> str | None:
    """Say why this backend is missing, or None where it is there."""
    kernels, problem = _load()
    if kernels is None:
        return f"Triton is missing from this installation ({problem}). Install it: pip install 'triton>=3.6'"
    if not is_interpreted() and not torch.cuda.is_available():
        return (
            "PyTorch finds no CUDA or ROCm device. Set TRITON_INTERPRET=1 in the environment to check the kernels on "
            "the CPU, slowly"
        )
    return None


def detail() -> str:
    """Say what this backend runs on."""
    version = importlib.import_module("triton").__version__
    where = "its interpreter on the CPU, for checks" if is_interpreted() else torch.cuda.get_device_name()
    return f"Triton {version}, {where}"


@cache
def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return not isinstance(_kernels().update_rows, importlib.import_module("triton.runtime").JITFunction)


def _kernels() -> ModuleType:
    kernels, _ = _load()
    assert kernels is not None, "the Triton backend was chosen without Triton"
    return kernels


def prepare(update: RowUpdate) -> str | None:
    """Make room for a table's new slots.

    Returns:
        Why this table's step cannot run in Triton, or None where it can.
    """
    reason = _refusal(update.table, update.moments)
    if reason is None:
        update.moments.make_room(update.num_lookups)
    return reason


def _refusal(table: Tensor, moments: Moments) -> str | None:
    if table.device.type != ("cpu" if is_interpreted() else "cuda"):
        where = "interpreted, on the CPU" if is_interpreted() else "on CUDA and ROCm devices"
        return f"it runs {where}, and the table is on {table.device}"
    return layout_refusal(moments.layout) or memory_refusal(table, moments)


@torch.no_grad()
def check_rows(updates: Sequence[RowUpdate], *, strict: bool) -> list[TouchedRows]:
    """List the touched rows of each table that has lookups, and see that all can be updated; writes nothing.

    A row outside its table fails a device-side assertion, for which the host does not wait, unless ``strict``.

    Raises:
        IndexError: where that is waited for (``strict``, or the table is on the CPU): an index outside its table,
            named.
        RuntimeError: naming the first rows of a table whose summed gradient is not finite, where that is refused.
    """
    updates = [update for update in updates if update.num_lookups > 0]
    for update in updates:
        sparse_shape = update.table.shape[: update.moments.sparse_dim]
        if strict or not _asserts_on_device(update.table.device):
            _validate.check_indices(update.indices, sparse_shape, update.place)
        else:
            assert_rows(update.indices, sparse_shape, update.place)
    touched = [_list_rows(update) for update in updates]
    for rows in touched:
        _check_finite(rows)
    return touched


def _asserts_on_device(device: torch.device) -> bool:
    """Whether a failed assertion stops the kernels queued after it: ROCm builds of PyTorch leave assertions out."""
    return device.type == "cuda" and torch.version.hip is None


def assert_rows(indices: Tensor, sparse_shape: Sequence[int], place: _validate.Place) -> None:
    """Assert, without waiting for the device, that lookups are inside their table."""
    is_inside = torch.ones((), dtype=torch.bool, device=indices.device)
    for size, index in zip(sparse_shape, indices, strict=True):
        is_inside &= ((index >= 0) & (index < size)).all()
    torch._assert_async(is_inside, _validate.row_assertion(place))


def _list_rows(update: RowUpdate) -> TouchedRows:
    moments, num_lookups = update.moments, update.num_lookups
    rows = reference.flatten_indices(update.indices, update.table.shape[: moments.sparse_dim])
    sorted_rows, order = torch.sort(rows, stable=True)
    is_first = torch.ones(num_lookups, dtype=torch.bool, device=rows.device)
    torch.ne(sorted_rows[1:], sorted_rows[:-1], out=is_first[1:])
    segments = is_first.cumsum(0)
    block = _block_length(num_lookups, 1)
    begins = torch.empty(num_lookups + 1, dtype=torch.int64, device=rows.device)
    _launch(
        "list_rows",
        _num_programs(num_lookups, block),
        rows.device,
        segments=segments,
        begins=begins,
        num_lookups=num_lookups,
        BLOCK=block,
    )
    is_new = torch.zeros(num_lookups, dtype=torch.int8, device=rows.device)
    looks = update.scalars.nonfinite != NONFINITE["propagate"]
    is_finite = torch.ones_like(is_new) if looks else None
    touched = TouchedRows(update, sorted_rows, order, segments, begins, is_new, is_finite)
    blocks = _blocks(moments, num_lookups)
    _launch(
        "find_rows",
        _num_programs(num_lookups, blocks["BLOCK_ROWS"]),
        rows.device,
        sorted_rows=sorted_rows,
        order=order,
        segments=segments,
        begins=begins,
        values=update.values,
        slot_of_row=moments.slot_of_row,
        is_new=is_new,
        is_finite=is_finite,
        num_lookups=num_lookups,
        num_rows=moments.num_rows,
        width=moments.width,
        DTYPE=_dtype(moments.dtype),
        LOOKS=looks,
        **blocks,
    )
    return touched


def _check_finite(touched: TouchedRows) -> None:
    if touched.update.scalars.nonfinite != NONFINITE["error"]:
        return
    assert touched.is_finite is not None
    bad = torch.nonzero(touched.is_finite == 0).flatten()[:ROWS_NAMED]
    if len(bad) > 0:
        raise _validate.nonfinite_error(touched.update.place, touched.sorted_rows[touched.begins[bad]].tolist())


@torch.no_grad()
def update_rows(updates: Sequence[RowUpdate], touched: Sequence[TouchedRows]) -> None:
    """Update in place the touched rows of each table, listed by ``check_rows``, and the moments of all ``updates``."""
    for rows in touched:
        _update_table(rows)
    for update in updates:
        update.moments.step += 1
        update.moments.log_decay += update.scalars.log_decay
    report_writes([rows.update.table for rows in touched])


def _update_table(touched: TouchedRows) -> None:
    update = touched.update
    moments, scalars, num_lookups = update.moments, update.scalars, update.num_lookups
    counts = moments.device_counts
    new_counts = touched.is_new.cumsum(0, dtype=torch.int64)
    blocks = _blocks(moments, num_lookups)
    numbers = {
        **scalars._asdict(),
        "log2_beta1": _log2(scalars.beta1),
        "log2_beta2": _log2(scalars.beta2),
        "log_decay": moments.log_decay + scalars.log_decay,
    }
    _launch(
        "update_rows",
        _num_programs(num_lookups, blocks["BLOCK_ROWS"]),
        update.table.device,
        sorted_rows=touched.sorted_rows,
        order=touched.order,
        segments=touched.segments,
        begins=touched.begins,
        values=update.values,
        is_new=touched.is_new,
        new_counts=new_counts,
        is_finite=touched.is_finite,
        counters=counts.tensor,
        slot_of_row=moments.slot_of_row,
        table=update.table,
        num_lookups=num_lookups,
        num_rows=moments.num_rows,
        width=moments.width,
        table_stride=row_stride(update.table, moments),
        step_key=rounding.step_key(scalars.seed, update.place.stream, scalars.step),
        **_parts(moments, min(moments.capacity, counts.most_slots() + num_lookups)),
        **{name: _bits(numbers[name]) for name in _kernels().NUMBERS},
        DTYPE=_dtype(moments.dtype),
        **variant(moments.layout, update),
        **blocks,
    )
    counts.tensor[0] += new_counts[-1]
    if scalars.nonfinite == NONFINITE["skip"]:
        assert touched.is_finite is not None
        counts.tensor[1] += (touched.is_finite == 0).sum()
    counts.note_step(num_lookups)


def variant(layout: StateLayout, update: RowUpdate) -> dict[str, Any]:
    """Return which of the kernel's branches a table's step takes."""
    kernels = _kernels()
    stored = {None: kernels.OWN, torch.bfloat16: kernels.BFLOAT16, torch.uint8: kernels.CODE8}
    return {
        "STORED": stored[layout.stored_dtype],
        "ONE_EXP_AVG_SQ_A_ROW": layout.one_exp_avg_sq_a_row,
        "AMSGRAD": layout.amsgrad,
        "ROW_STEPS": layout.row_steps,
        "TORCH_EPS": update.scalars.torch_eps and layout.row_steps,
        "OWES_DECAY": layout.owes_decay,
        "STOCHASTIC_ROUNDING": update.stochastic_rounding,
        "SKIPS": update.scalars.nonfinite == NONFINITE["skip"],
    }


_PARTS = (
    "rows",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_avg_scale",
    "exp_avg_sq_scale",
    "row_steps",
    "paid_log_decay",
)


def _parts(moments: Moments, num_slots: int) -> dict[str, Any]:
    parts = moments.memory_of(num_slots)
    strides = {
        "exp_avg_stride": parts["exp_avg"].stride(0),
        "exp_avg_sq_stride": parts["exp_avg_sq"].stride(0),
        "scale_stride": parts["exp_avg_scale"].stride(0) if "exp_avg_scale" in parts else 0,
    }
    return {**{name: parts.get(name) for name in _PARTS}, **strides}


def _blocks(moments: Moments, num_lookups: int) -> dict[str, int]:
    """Return the block that a program updates at a time."""
    widest = rounding.BLOCK_SIZE if moments.layout.stored_dtype is torch.uint8 else _MAX_BLOCK_WIDTH
    block_width = min(_next_power_of_two(moments.width), widest)
    return {"BLOCK_ROWS": _block_length(min(num_lookups, moments.num_rows), block_width), "BLOCK_WIDTH": block_width}


def _block_length(most: int, width: int) -> int:
    """Return how many rows or lookups a program has in hand at a time; there are at most so many."""
    if not is_interpreted():
        return max(1, _BLOCK_ELEMENTS // width)
    return max(1, min(_INTERPRETED_BLOCK_ELEMENTS // width, _next_power_of_two(most)))


def _next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _num_programs(count: int, count_of_each: int) -> int:
    return -(-count // count_of_each)


def _dtype(dtype: torch.dtype) -> Any:
    language = importlib.import_module("triton.language")
    return language.float64 if dtype is torch.float64 else language.float32


def _log2(number: float) -> float:
    return math.log2(number) if number > 0.0 else -math.inf


def _bits(number: float) -> int:
    """Return the bits of a double, which Triton would hand over in single precision."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


def _launch(name: str, num_programs: int, device: torch.device, **arguments: Any) -> None:
    with _running_on(device):
        getattr(_kernels(), name)[(num_programs,)](**arguments, **COMPILE_OPTIONS)


@contextlib.contextmanager
def _running_on(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
        return
    # The interpreter computes with NumPy, which would warn of every infinity and NaN.
    with importlib.import_module("numpy").errstate(all="ignore"):
        yield
