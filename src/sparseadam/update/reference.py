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
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from .. import _validate, rounding
from .._memory import in_stretches
from .._validate import Place
from ..history import BETA1, BETA2, EPS, LOG_DECAY, NEGLIGIBLE, ROOT_SCALE, STEP_SIZE
from ..moments import ROWS_AT_ONCE, Moments, StateLayout
from ._types import NONFINITE, ROWS_NAMED, RowsRead, RowUpdate, StepScalars, bias_corrections


class SummedRows(NamedTuple):
    """The touched rows of a table, ascending, int64 ``[num_touched]``, and their gradients, ``[num_touched, ...]``."""

    rows: Tensor
    grad: Tensor


@torch.no_grad()
def check_rows(updates: Sequence[RowUpdate]) -> list[SummedRows | None]:
    """Refuse an index outside its table, rows that are behind, and what is not finite where that is asked for.

    Returns:
        For each update, its sums if they had to be looked at.

    Raises:
        IndexError: naming the first table with a bad index, and the index.
        RuntimeError: naming the first rows of a table that are behind, or whose summed gradient is not finite.
    """
    for update in updates:
        check_range(update)
    for update in updates:
        if update.moments.history is not None:
            behind = rows_behind(update.moments, touched_rows(update))
            if len(behind) > 0:
                raise _validate.behind_error(update.place, behind[:ROWS_NAMED].tolist())
    return [_check_finite(update) if update.num_lookups > 0 else None for update in updates]


def _check_finite(update: RowUpdate) -> SummedRows | None:
    if update.scalars.nonfinite != NONFINITE["error"]:
        return None
    summed = _summed(update)
    bad = summed.rows[~_is_finite(summed.grad)]
    if len(bad) > 0:
        raise _validate.nonfinite_error(update.place, update.moments.names_of(bad[:ROWS_NAMED]).tolist())
    return summed


def flatten_indices(indices: Tensor, sparse_shape: Sequence[int]) -> Tensor:
    """Return the row of each lookup."""
    rows = torch.zeros(indices.shape[1], dtype=torch.int64, device=indices.device)
    for size, index in zip(sparse_shape, indices, strict=True):
        rows = rows * size + index
    return rows


def coalesce_rows(
    indices: Tensor, values: Tensor, sparse_shape: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum the lookups of each row, in lookup order.

    Returns:
        The touched rows, ascending, ``[num_touched]``, and their gradients ``[num_touched, *row_shape]`` in ``dtype``.
    """
    # Tensor.coalesce() would do, but it takes a gradient's word for being coalesced and sums in an order of its own.
    rows, order = torch.sort(flatten_indices(indices, sparse_shape), stable=True)
    touched, counts = torch.unique_consecutive(rows, return_counts=True)
    lookups_by_row = values[order].to(dtype).reshape(len(rows), -1)
    grad = torch.segment_reduce(lookups_by_row, "sum", lengths=counts, axis=0)
    return touched, grad.reshape(len(touched), *values.shape[1:])


def touched_rows(update: RowUpdate) -> Tensor:
    """Return the rows that an update names, ascending, int64 ``[num_touched]``; their range has been checked."""
    rows: Tensor = torch.unique(flatten_indices(update.indices, update.table.shape[: update.moments.sparse_dim]))
    return rows


def check_range(update: RowUpdate) -> None:
    """Refuse an index outside its table.

    Raises:
        IndexError: naming the first one.
    """
    _validate.check_indices(update.indices, update.table.shape[: update.moments.sparse_dim], update.place)


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
    num_skipped = 0
    if scalars.nonfinite == NONFINITE["skip"]:
        is_finite = _is_finite(grad)
        num_skipped = len(rows) - int(is_finite.sum())
        rows, grad = rows[is_finite], grad[is_finite]
    with moments.claimed_slots(rows) as slots:
        update_slots(update, slots, SummedRows(rows, grad))
    moments.num_skipped += num_skipped


def update_slots(update: RowUpdate, slots: Tensor, summed: SummedRows) -> None:
    """Update in place the touched rows of a table whose slots are known, and their moments.

    Whatever takes memory comes before the first write: there may be none left, and then nothing has changed.
    No shape here depends on what a tensor holds, so the rule can be traced on the ``meta`` device.

    Args:
        update: of its parts the lookups are not read.
        slots: int64 ``[num_touched]``.
        summed: the rows and their summed gradients.
    """
    moments, scalars = update.moments, update.scalars
    rows, grad = summed
    changed: dict[str, Tensor | float] = {}
    step_size: float | Tensor = scalars.step_size
    root_scale: float | Tensor = scalars.root_scale
    if moments.layout.row_steps:
        touches = moments["row_steps"][slots].to(torch.int64) + 1
        touches = touches.clamp_(max=torch.iinfo(torch.int32).max)  # there both corrections are 1
        changed["row_steps"] = touches.to(torch.int32)
        step_size, root_scale = _row_corrections(moments, touches, scalars)

    exp_avg = moments.read("exp_avg", slots).mul_(scalars.beta1).add_(grad * scalars.one_minus_beta1)
    is_row_wise = moments.layout.one_exp_avg_sq_a_row
    square = _mean_square(grad) if is_row_wise else grad * grad
    exp_avg_sq = moments.read("exp_avg_sq", slots).mul_(scalars.beta2).add_(square.mul_(scalars.one_minus_beta2))
    changed |= moments.encoded("exp_avg", exp_avg, _bits_for(moments.layout, update, rows, rounding.EXP_AVG))
    changed |= moments.encoded("exp_avg_sq", exp_avg_sq, _bits_for(moments.layout, update, rows, rounding.EXP_AVG_SQ))
    if moments.layout.amsgrad:
        exp_avg_sq = torch.maximum(moments["max_exp_avg_sq"][slots], exp_avg_sq)
        changed["max_exp_avg_sq"] = exp_avg_sq

    if moments.layout.replays:
        # Weights wait: catch_up moves them by this step and by those that the row misses then.
        changed |= {"moment_steps": moments.step + 1, "weight_steps": moments.step}
        moments.put(slots, changed)
        return

    denom = _as_rows(exp_avg_sq, grad).sqrt().mul(root_scale).add_(scalars.eps)
    change = (exp_avg * step_size).div_(denom)
    owed = moments.log_decay + scalars.log_decay
    decay = _row_decay(moments, slots, scalars.decay, owed)
    if moments.layout.owes_decay:
        changed["paid_log_decay"] = owed
    random = None
    if update.stochastic_rounding:
        random = _random_bits(update, rows, rounding.TABLE)
    write_rows = _rows_to_write(update.table, moments, rows, lambda weights: _decayed(weights, decay) - change, random)
    moments.put(slots, changed)
    write_rows()


def _mean_square(grad: Tensor) -> Tensor:
    square = grad * grad
    # The mean of a row without elements is taken as zero.
    width = math.prod(grad.shape[1:])
    return square.reshape(len(grad), width).sum(1) / max(width, 1)


def _row_corrections(moments: Moments, touches: Tensor, scalars: StepScalars) -> tuple[Tensor, Tensor]:
    """Return ``step_size`` and ``root_scale`` of each row, by how often it was touched."""
    touches = touches.to(torch.float64)
    corrections = bias_corrections(scalars.lr, scalars.beta1, scalars.beta2, touches, scalars.torch_eps)
    step_size, root_scale = (moments.as_rows(correction) for correction in corrections)
    return step_size, root_scale


def _row_decay(moments: Moments, slots: Tensor, decay_of_step: float, owed: float) -> Tensor:
    """Return what each row's weights are multiplied by: the decay of all that it owes, or of this step."""
    if not moments.layout.owes_decay:
        return torch.full((len(slots),), decay_of_step, dtype=moments.dtype, device=moments.device)
    decay: Tensor = (owed - moments["paid_log_decay"][slots]).exp()
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


def _rows_to_write(
    table: Tensor, moments: Moments, rows: Tensor, change: Callable[[Tensor], Tensor], random: Tensor | None
) -> Callable[[], object]:
    """Change rows of a table, in the dtype of its moments, and round them once; return what writes them."""
    # A table may have any strides, so it is indexed by its own leading dimensions and not viewed as [num_rows, width].
    if len(rows) == 0:
        return lambda: None
    index = torch.unravel_index(rows, table.shape[: moments.sparse_dim]) if moments.sparse_dim > 0 else (None,)
    weights = change(table[index].to(moments.dtype))
    if random is None:
        rounded = weights.to(table.dtype)
    else:
        rounded = rounding.round_stochastically(weights, random.reshape(weights.shape), table.dtype)
    if moments.sparse_dim > 0:
        return partial(table.index_put_, index, rounded)
    return partial(table.copy_, rounded[0])


# Missed steps ---------------------------------------------------------------------------------------


def rows_behind(moments: Moments, rows: Tensor) -> Tensor:
    """Return which of ``rows`` (distinct, inside the table) have yet to take steps that move them."""
    assert moments.history is not None, "only where missed steps are replayed"
    slots = moments.slot_of_row[rows].to(torch.int64) - 1
    # A row without a slot has no moments: weight decay alone moves it.
    is_behind = torch.full_like(rows, moments.history.log_decay != 0.0, dtype=torch.bool)
    is_behind[slots >= 0] = moments.are_behind(slots[slots >= 0])
    return rows[is_behind]


@torch.no_grad()
def catch_up(read: RowsRead) -> None:
    """Take the rows that are about to be read through the steps that their weights have yet to take, one by one.

    The first may be the row's own, in which its moments were written; in those that it has missed the gradient is zero.
    Steps that come so late that they are negligible (``history.py``) only decay weights.

    Raises:
        IndexError: a row outside the table; nothing was written.
    """
    moments = read.moments
    _validate.check_row_range(read.rows, moments.num_rows, read.place)
    rows = rows_behind(moments, torch.unique(read.rows))
    if len(rows) == 0:
        return
    random = _bits_of_missed_steps(moments, rows, read.place, read.seed) if read.stochastic_rounding else None
    # Autograd need not be told: what a graph has read of these rows was up to date, and such rows are not written.
    with moments.claimed_slots(rows) as slots, _unsafe_preserve_version_counter(read.table):
        _rows_to_write(read.table, moments, rows, lambda weights: _replayed(weights, moments, slots), random)()
        moments.put(slots, {"weight_steps": moments.step})


def _bits_of_missed_steps(moments: Moments, rows: Tensor, place: Place, seed: int) -> Tensor:
    return rounding.random_bits(seed, place.stream, moments.step, rows, rounding.MISSED_STEPS, moments.width)


def _replayed(weights: Tensor, moments: Moments, slots: Tensor) -> Tensor:
    """Return the weights of slots' rows after all steps so far."""
    assert moments.history is not None, "only where missed steps are replayed"
    base = moments.history.base
    numbers = moments.history.numbers().to(moments.device)
    # A row that has just got its slot has clocks of zero, and was up to date at the base.
    entries, written = (
        moments[name][slots].to(torch.int64).clamp(min=base) - base for name in ("weight_steps", "moment_steps")
    )
    factors = moments.missed_factors(slots, base + torch.maximum(entries, written))
    exp_avg, exp_avg_sq = (
        moments[name][slots] * moments.as_rows(factor)
        for name, factor in zip(("exp_avg", "exp_avg_sq"), factors, strict=True)
    )
    # Of what the moments were when they were written, what is left of their quotient: r**n.
    left = factors[0] / factors[1].sqrt()
    rows = torch.arange(len(slots), device=moments.device)
    moved_to = entries.clone()
    while True:
        is_moving = (entries < moments.history.num_steps) & (left >= NEGLIGIBLE)
        if not is_moving.any():
            break
        rows, entries, left = rows[is_moving], entries[is_moving] + 1, left[is_moving]
        step = numbers[entries]
        # The step that wrote a row's moments has its gradient in them; from the next one on they decay.
        betas = torch.where((entries == written[rows])[:, None], 1.0, step[:, [BETA1, BETA2]])
        left = left * betas[:, 0] / betas[:, 1].sqrt()
        exp_avg = exp_avg[is_moving] * moments.as_rows(betas[:, 0])
        exp_avg_sq = exp_avg_sq[is_moving] * moments.as_rows(betas[:, 1])
        step_size, root_scale, eps = (moments.as_rows(step[:, column]) for column in (STEP_SIZE, ROOT_SCALE, EPS))
        change = step_size * exp_avg / (exp_avg_sq.sqrt() * root_scale + eps)
        decay = moments.as_rows((step[:, LOG_DECAY] - numbers[entries - 1, LOG_DECAY]).exp())
        weights[rows] = weights[rows] * decay - change
        moved_to[rows] = entries
    left_over = numbers[-1, LOG_DECAY] - numbers[moved_to, LOG_DECAY]
    return _decayed(weights, left_over.exp().to(moments.dtype))


@torch.no_grad()
def decay_untouched(table: Tensor, moments: Moments, place: Place, seed: int, *, stochastic_rounding: bool) -> None:
    """Apply the weight decay of all missed steps to the rows that have no slot; the moments forget none of it."""
    assert moments.history is not None, "only where missed steps are replayed"
    decay = torch.tensor(moments.history.log_decay, dtype=torch.float64, device=table.device).exp().to(moments.dtype)

    def decay_rows(begin: int, end: int) -> None:
        rows = (moments.slot_of_row[begin:end] == 0).nonzero()[:, 0] + begin
        random = _bits_of_missed_steps(moments, rows, place, seed) if stochastic_rounding else None
        with _unsafe_preserve_version_counter(table):
            _rows_to_write(table, moments, rows, lambda weights: weights * decay, random)()

    in_stretches(decay_rows, moments.num_rows, ROWS_AT_ONCE)


@torch.no_grad()
def pay_decay(table: Tensor, moments: Moments, place: Place, seed: int, *, stochastic_rounding: bool) -> None:
    """Apply to every row of a table, never touched ones too, the weight decay that it owes; then none owes any."""
    if moments.log_decay == 0.0:
        return

    def pay(begin: int, end: int) -> None:
        rows = torch.arange(begin, end, device=moments.device)
        slots = moments.slot_of_row[rows].to(torch.int64) - 1
        paid = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        paid[slots >= 0] = moments["paid_log_decay"][slots[slots >= 0]]
        decay = (moments.log_decay - paid).exp().to(table.device, moments.dtype)
        rows = rows.to(table.device)
        random = _bits_of_missed_steps(moments, rows, place, seed) if stochastic_rounding else None
        _rows_to_write(table, moments, rows, partial(_decayed, decay=decay), random)()

    in_stretches(pay, moments.num_rows, ROWS_AT_ONCE)
    moments["paid_log_decay"].zero_()
    moments.log_decay = 0.0
