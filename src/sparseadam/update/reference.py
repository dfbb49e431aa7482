"""The rule in plain PyTorch operations, on any device: what the other backends are measured against.

Computes in the dtype of the moments (float32 for half-precision tables) and rounds to the table's dtype once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _validate, rounding
from .._validate import Place
from ..moments import Moments, StateLayout
from ._types import NONFINITE, ROWS_NAMED, RowUpdate, StepScalars, bias_corrections

_ROWS_AT_ONCE = 1 << 16


class SummedRows(NamedTuple):
    """The touched rows of a table, ascending, int64 ``[num_touched]``, and their gradients, ``[num_touched, ...]``."""

    rows: Tensor
    grad: Tensor


@torch.no_grad()
def check_rows(updates: Sequence[RowUpdate]) -> list[SummedRows | None]:
    """Refuse an index outside its table, and what is not finite where that is asked for.

    Returns:
        For each update, its sums if they had to be looked at.

    Raises:
        IndexError: naming the first table with a bad index, and the index.
        RuntimeError: naming the first rows of a table whose summed gradient is not finite.
    """
    for update in updates:
        _validate.check_indices(update.indices, update.table.shape[: update.moments.sparse_dim], update.place)
    return [_check_finite(update) if update.num_lookups > 0 else None for update in updates]


def _check_finite(update: RowUpdate) -> SummedRows | None:
    if update.scalars.nonfinite != NONFINITE["error"]:
        return None
    summed = _summed(update)
    bad = summed.rows[~_is_finite(summed.grad)]
    if len(bad) > 0:
        raise _validate.nonfinite_error(update.place, update.moments.names_of(bad[:ROWS_NAMED]).tolist())
    return summed


def coalesce_rows(
    indices: Tensor, values: Tensor, sparse_shape: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum the lookups of each row, in lookup order.

    Returns:
        The touched rows, ascending, ``[num_touched]``, and their gradients ``[num_touched, *row_shape]`` in ``dtype``.
    """
    rows = flatten_indices(indices, sparse_shape)
    # Tensor.coalesce() would do, but it takes a gradient's word for being coalesced and sums in an order of its own.
    rows, order = torch.sort(rows, stable=True)
    touched, counts = torch.unique_consecutive(rows, return_counts=True)
    lookups_by_row = values[order].to(dtype).reshape(len(rows), -1)
    grad = torch.segment_reduce(lookups_by_row, "sum", lengths=counts, axis=0)
    return touched, grad.reshape(len(touched), *values.shape[1:])


def flatten_indices(indices: Tensor, sparse_shape: Sequence[int]) -> Tensor:
    """Return the row of each lookup, int64 ``[num_lookups]``, in the table viewed as ``[num_rows, width]``."""
    rows = torch.zeros(indices.shape[1], dtype=torch.int64, device=indices.device)
    for size, index in zip(sparse_shape, indices, strict=True):
        rows = rows * size + index
    return rows


def _summed(update: RowUpdate) -> SummedRows:
    sparse_shape = update.table.shape[: update.moments.sparse_dim]
    return SummedRows(*coalesce_rows(update.indices, update.values, sparse_shape, update.moments.dtype))


def _is_finite(grad: Tensor) -> Tensor:
    is_finite: Tensor = grad.isfinite().flatten(1).all(1) if grad.dim() > 1 else grad.isfinite()
    return is_finite


@torch.no_grad()
def update_rows(updates: Sequence[RowUpdate], summed: Sequence[SummedRows | None]) -> None:
    """Update the touched rows of each table, their moments and counters in place; ``check_rows`` gave the sums."""
    for update, known in zip(updates, summed, strict=True):
        if update.num_lookups > 0:
            _update_table(update, known or _summed(update))
        update.moments.step += 1
        update.moments.log_decay += update.scalars.log_decay


def _update_table(update: RowUpdate, summed: SummedRows) -> None:
    moments, scalars = update.moments, update.scalars
    rows, grad = summed
    if scalars.nonfinite == NONFINITE["skip"]:
        is_finite = _is_finite(grad)
        moments.num_skipped += len(rows) - int(is_finite.sum())
        rows, grad = rows[is_finite], grad[is_finite]
    update_slots(update, moments.claim_slots(rows), SummedRows(rows, grad))


def update_slots(update: RowUpdate, slots: Tensor, summed: SummedRows) -> None:
    """Update in place the touched rows of a table whose slots are known, and their moments.

    No shape here depends on what a tensor holds, so the rule can be traced on the ``meta`` device.

    Args:
        update: of its parts the lookups are not read.
        slots: int64 ``[num_touched]``.
        summed: the rows and their summed gradients.
    """
    moments, scalars = update.moments, update.scalars
    rows, grad = summed
    step_size, root_scale = _row_corrections(moments, slots, scalars)

    exp_avg = moments.read("exp_avg", slots).mul_(scalars.beta1).add_(grad * scalars.one_minus_beta1)
    is_row_wise = moments.layout.one_exp_avg_sq_a_row
    square = _mean_square(grad) if is_row_wise else grad * grad
    exp_avg_sq = moments.read("exp_avg_sq", slots).mul_(scalars.beta2).add_(square.mul_(scalars.one_minus_beta2))
    moments.write("exp_avg", slots, exp_avg, _bits_for(moments.layout, update, rows, rounding.EXP_AVG))
    moments.write("exp_avg_sq", slots, exp_avg_sq, _bits_for(moments.layout, update, rows, rounding.EXP_AVG_SQ))
    if moments.layout.amsgrad:
        exp_avg_sq = torch.maximum(moments["max_exp_avg_sq"][slots], exp_avg_sq)
        moments["max_exp_avg_sq"][slots] = exp_avg_sq

    denom = _as_rows(exp_avg_sq, grad).sqrt().mul(root_scale).add_(scalars.eps)
    change = exp_avg.mul_(step_size).div_(denom)
    decay = _row_decay(moments, slots, scalars)
    random = None
    if update.stochastic_rounding:
        random = _random_bits(update, rows, rounding.TABLE)
    _write_table(update.table, moments, rows, lambda weights: _decayed(weights, decay) - change, random)


def _mean_square(grad: Tensor) -> Tensor:
    square = grad * grad
    # The mean of a row without elements is taken as zero.
    width = math.prod(grad.shape[1:])
    return square.reshape(len(grad), width).sum(1) / max(width, 1)


def _row_corrections(moments: Moments, slots: Tensor, scalars: StepScalars) -> tuple[float | Tensor, float | Tensor]:
    """Return ``step_size`` and ``root_scale``: the step's, or each row's by its own touches, which are counted here."""
    if not moments.layout.row_steps:
        return scalars.step_size, scalars.root_scale
    moments["row_steps"][slots] += 1
    touches = moments["row_steps"][slots].to(torch.float64)
    corrections = bias_corrections(scalars.lr, scalars.beta1, scalars.beta2, touches, scalars.torch_eps)
    shape = (len(slots), *(1,) * len(moments.row_shape))
    step_size, root_scale = (correction.to(moments.dtype).reshape(shape) for correction in corrections)
    return step_size, root_scale


def _row_decay(moments: Moments, slots: Tensor, scalars: StepScalars) -> Tensor:
    """Return what each row's weights are multiplied by; what is owed is taken as paid."""
    if not moments.layout.owes_decay:
        return torch.full((len(slots),), scalars.decay, dtype=moments.dtype, device=moments.device)
    owed = moments.log_decay + scalars.log_decay
    decay: Tensor = (owed - moments["paid_log_decay"][slots]).exp()
    moments["paid_log_decay"][slots] = owed
    return decay.to(moments.dtype)


def _as_rows(values: Tensor, like: Tensor) -> Tensor:
    """Give values, if there is one a row, the dimensions of rows."""
    return values.reshape(*values.shape, *(1,) * (like.dim() - values.dim()))


def _bits_for(layout: StateLayout, update: RowUpdate, rows: Tensor, what: int) -> Tensor | None:
    is_rounded = layout.stored_dtype is not None and not (what == rounding.EXP_AVG_SQ and layout.one_exp_avg_sq_a_row)
    return _random_bits(update, rows, what) if is_rounded else None


def _random_bits(update: RowUpdate, rows: Tensor, what: int) -> Tensor:
    scalars = update.scalars
    names = update.moments.names_of(rows)
    return rounding.random_bits(scalars.seed, update.place.stream, scalars.step, names, what, update.moments.width)


def _decayed(weights: Tensor, decay: Tensor) -> Tensor:
    return weights * _as_rows(decay, weights)


def _write_table(
    table: Tensor, moments: Moments, rows: Tensor, change: Callable[[Tensor], Tensor], random: Tensor | None
) -> None:
    """Change rows of a table, in the dtype of its moments, and round them once."""
    # A table may have any strides, so it is indexed by its own leading dimensions and not viewed as [num_rows, width].
    if len(rows) == 0:
        return
    index = torch.unravel_index(rows, table.shape[: moments.sparse_dim]) if moments.sparse_dim > 0 else (None,)
    weights = change(table[index].to(moments.dtype))
    if random is None:
        rounded = weights.to(table.dtype)
    else:
        rounded = rounding.round_stochastically(weights, random.reshape(weights.shape), table.dtype)
    if moments.sparse_dim > 0:
        table[index] = rounded
    else:
        table.copy_(rounded[0])


@torch.no_grad()
def pay_decay(table: Tensor, moments: Moments, place: Place, seed: int, *, stochastic_rounding: bool) -> None:
    """Apply to every row of a table, never touched ones too, the weight decay that it owes; afterwards none owes any.

    Rows are taken a stretch at a time, so that nothing is made that grows with the table.
    """
    if moments.log_decay == 0.0:
        return
    for begin in range(0, moments.num_rows, _ROWS_AT_ONCE):
        rows = torch.arange(begin, min(begin + _ROWS_AT_ONCE, moments.num_rows), device=moments.device)
        slots = moments.slot_of_row[rows].to(torch.int64) - 1
        paid = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        paid[slots >= 0] = moments["paid_log_decay"][slots[slots >= 0]]
        decay = (moments.log_decay - paid).exp().to(table.device, moments.dtype)
        rows = rows.to(table.device)
        random = None
        if stochastic_rounding:
            random = rounding.random_bits(seed, place.stream, moments.step, rows, rounding.OWED_DECAY, moments.width)
        _write_table(table, moments, rows, partial(_decayed, decay=decay), random)
    moments["paid_log_decay"].zero_()
    moments.log_decay = 0.0
