"""The Triton kernels of a step: touched rows listed, then new rows given slots and every touched row updated.

For each touched row, with ``g`` the sum of its lookups' values in lookup order::

    exp_avg    = beta1 * exp_avg    + one_minus_beta1 * g
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (g * g)
    table      = decay * table - step_size * exp_avg / (sqrt(exp_avg_sq) * root_scale + eps)

and what options change in it as ``csrc/row_update.h`` lists. Kingma & Ba (2015), Algorithm 1; Loshchilov & Hutter
(2019); Reddi, Kale & Kumar (2018).

Sums and arithmetic are in the dtype of the moments: float64 for float64 tables, float32 for all others. Roots and
quotients are correctly rounded and the launcher turns contraction off, so the bits are those of the native backend
except where a mean is taken over a row or a row has corrections or a decay of its own. A row belongs to one program,
so no order is left to chance and nothing is added atomically.

``triton.py`` launches these and guarantees: lookups sorted by row, stably; a table whose rows are evenly spaced and
whose row elements are adjacent; room for every slot that the step can need. A row outside the table is not written even
where the assertion that should have stopped the step is compiled out.

Scalars are the bits of doubles, because Triton hands floats over in single precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _triton_rounding as rounding

# Moments as they are stored: in their own dtype, as bfloat16, or as 8-bit codes with a scale for each block of a row.
OWN, BFLOAT16, CODE8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# Of a step, as the bits of doubles.
NUMBERS = (
    "beta1",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "step_size",
    "root_scale",
    "eps",
    "decay",
    "lr",
    "log2_beta1",
    "log2_beta2",
    "log_decay",
)
# What changes from step to step: no kernel is compiled anew for a number that happens to be 1 or a multiple of 16.
_CHANGING = ["num_lookups", "num_rows", "step_key", *NUMBERS]


@triton.jit
def _number(bits, dtype: tl.constexpr):
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit(do_not_specialize=_CHANGING[:1])
def list_rows(segments, begins, num_lookups: tl.int64, BLOCK: tl.constexpr):
    """Write where each touched row's lookups begin.

    ``segments`` int64 ``[num_lookups]`` counts the touched rows up to each sorted lookup, its own included; ``begins``
    int64 ``[num_lookups + 1]`` gets the first lookup of each of them, and after the last one the end of all.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_lookup = i < num_lookups
    segment = tl.load(segments + i, mask=is_lookup, other=0)
    before = tl.load(segments + i - 1, mask=is_lookup & (i > 0), other=0)
    tl.store(begins + before, i, mask=is_lookup & (segment > before))
    tl.store(begins + segment, num_lookups + tl.zeros_like(i), mask=i == num_lookups - 1)


@triton.jit
def _touched_rows(sorted_rows, begins, num_touched, num_rows, BLOCK_ROWS: tl.constexpr):
    """Return, for this program's touched rows, which there are, their rows, and where their lookups begin and end."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = r < num_touched
    begin = tl.load(begins + r, mask=is_row, other=0)
    end = tl.load(begins + r + 1, mask=is_row, other=0)
    row = tl.load(sorted_rows + begin, mask=is_row, other=0)
    return r, is_row & (row >= 0) & (row < num_rows), row, begin, end


@triton.jit
def _sum_block(values, order, begin, end, first, is_row, width, dtype: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Return the sum of each row's lookups, in lookup order, in the block of columns from ``first`` up.

    With it, ``[rows, columns]``, come the columns' numbers and which elements there are.
    """
    columns = first + tl.arange(0, BLOCK_WIDTH)[None, :]
    is_element = is_row[:, None] & (columns < width)
    total = tl.zeros(is_element.shape, dtype)
    for offset in range(0, tl.max(end - begin, axis=0)):
        position = begin + offset
        is_lookup = position < end
        lookup = tl.load(order + position, mask=is_lookup, other=0)
        value = tl.load(values + lookup[:, None] * width + columns, mask=is_lookup[:, None] & is_element, other=0.0)
        total += rounding.widen(value, dtype)
    return total, columns, is_element


@triton.jit(do_not_specialize=_CHANGING[:2])
def find_rows(
    sorted_rows,
    order,
    segments,
    begins,
    values,
    slot_of_row,
    is_new,
    is_finite,
    num_lookups: tl.int64,
    num_rows: tl.int64,
    width,
    DTYPE: tl.constexpr,
    LOOKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Write, for each touched row, whether it has no slot yet and, with ``LOOKS``, whether its gradient is finite.

    ``is_new`` and ``is_finite`` are int8 ``[num_lookups]``, of which as many are written as rows are touched; rows that
    are not finite are not new. The launcher has set them to 0 and 1.
    """
    num_touched = tl.load(segments + num_lookups - 1)
    if tl.program_id(0).to(tl.int64) * BLOCK_ROWS >= num_touched:
        return  # there are programs for as many rows as there are lookups
    r, is_row, row, begin, end = _touched_rows(sorted_rows, begins, num_touched, num_rows, BLOCK_ROWS)
    end = tl.where(is_row, end, begin)
    wants_slot = tl.load(slot_of_row + row, mask=is_row, other=1) == 0
    if LOOKS:
        bad = tl.zeros([BLOCK_ROWS], tl.int32)
        for first in range(0, width, BLOCK_WIDTH):
            grad, _, _ = _sum_block(values, order, begin, end, first, is_row, width, DTYPE, BLOCK_WIDTH)
            # Infinite or NaN: neither less than infinity.
            bad = tl.maximum(bad, tl.max(tl.where(tl.abs(grad) < float("inf"), 0, 1), axis=1))
        tl.store(is_finite + r, (1 - bad).to(tl.int8), mask=is_row)
        wants_slot = wants_slot & (bad == 0)
    tl.store(is_new + r, wants_slot.to(tl.int8), mask=is_row)


@triton.jit
def _read_moment(part, scales, elements, blocks, is_row, mask, DTYPE, STORED: tl.constexpr, WHAT: tl.constexpr):
    """Return a block of moments in the dtype they are computed in, zero where nothing is kept."""
    stored = tl.load(part + elements, mask=mask, other=0)
    if STORED == CODE8:
        scale = tl.load(scales + blocks, mask=is_row, other=0.0)[:, None]
        if WHAT == rounding.EXP_AVG:
            return rounding.decode_exp_avg(stored, scale).to(DTYPE)
        else:
            return rounding.decode_exp_avg_sq(stored, scale).to(DTYPE)
    else:
        return rounding.widen(stored, DTYPE)


@triton.jit
def _write_moment(
    part, scales, elements, blocks, is_row, mask, moment, row_key, columns, STORED: tl.constexpr, WHAT: tl.constexpr
):
    """Store a block of moments; of fewer bits by stochastic rounding. Outside of ``mask`` they are zero."""
    if STORED == OWN:
        tl.store(part + elements, moment, mask=mask)
    else:
        random = rounding.random_bits(row_key, columns, WHAT)
        moment = moment.to(tl.float32)
        if STORED == BFLOAT16:
            tl.store(part + elements, rounding.narrow_stochastically(moment, random, tl.bfloat16), mask=mask)
        else:
            scale = rounding.block_scales(moment)
            tl.store(scales + blocks[:, None], scale, mask=is_row[:, None])
            if WHAT == rounding.EXP_AVG:
                tl.store(part + elements, rounding.encode_exp_avg(moment, scale, random), mask=mask)
            else:
                tl.store(part + elements, rounding.encode_exp_avg_sq(moment, scale, random), mask=mask)


@triton.jit
def _next_moment(
    part,
    scales,
    elements,
    blocks,
    is_row,
    mask,
    beta,
    grad,
    row_key,
    columns,
    DTYPE: tl.constexpr,
    STORED: tl.constexpr,
    WHAT: tl.constexpr,
):
    """Update a block of moments by ``grad``, which carries its factor; return them as they were before rounding."""
    moment = _read_moment(part, scales, elements, blocks, is_row, mask, DTYPE, STORED, WHAT)
    moment = beta * moment + grad
    _write_moment(part, scales, elements, blocks, is_row, mask, moment, row_key, columns, STORED, WHAT)
    return moment


@triton.jit
def _root(x, DTYPE: tl.constexpr):
    if DTYPE == tl.float64:
        return tl.sqrt(x)  # correctly rounded; in float32 it need not be
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _quotient(x, y, DTYPE: tl.constexpr):
    if DTYPE == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _larger(found, largest):
    """Return the larger one; a NaN stays one."""
    return tl.where((found > largest) | (found != found), found, largest)


@triton.jit
def _find_slots(r, row, is_row, is_new, new_counts, counters, slot_of_row, rows):
    """Return the slot of each row, and give new rows theirs."""
    is_new_row = tl.load(is_new + r, mask=is_row, other=0) != 0
    new_slot = tl.load(counters) + tl.load(new_counts + r, mask=is_row, other=1) - 1
    slot = tl.load(slot_of_row + row, mask=is_row, other=1).to(tl.int64) - 1
    slot = tl.where(is_new_row, new_slot, slot)
    tl.store(slot_of_row + row, (slot + 1).to(slot_of_row.dtype.element_ty), mask=is_new_row)
    tl.store(rows + slot, row, mask=is_new_row)
    return slot


@triton.jit
def _own_corrections(row_steps, slot, is_row, lr, log2_beta1, log2_beta2, DTYPE: tl.constexpr, TORCH_EPS: tl.constexpr):
    """Count a touch of each row; return its step size and what its root is multiplied by, ``[rows, 1]``."""
    touches = tl.load(row_steps + slot, mask=is_row, other=0)
    touches += (touches < 2147483647).to(tl.int32)  # there both corrections are 1
    tl.store(row_steps + slot, touches, mask=is_row)
    count = touches.to(tl.float64)[:, None]
    step_size = _number(lr, tl.float64) / (1.0 - tl.exp2(count * _number(log2_beta1, tl.float64)))
    root_correction2 = tl.sqrt(1.0 - tl.exp2(count * _number(log2_beta2, tl.float64)))
    if TORCH_EPS:
        step_size = step_size * root_correction2
        root_scale = tl.full(count.shape, 1.0, DTYPE)
    else:
        root_scale = (1.0 / root_correction2).to(DTYPE)
    return step_size.to(DTYPE), root_scale


@triton.jit
def _pay_decay(paid_log_decay, slot, is_row, log_decay, DTYPE: tl.constexpr):
    """Return the decay that each row owes, this step's included, ``[rows, 1]``, and note that it is paid."""
    owed = _number(log_decay, tl.float64)
    decay = tl.exp(owed - tl.load(paid_log_decay + slot, mask=is_row, other=0.0))[:, None].to(DTYPE)
    tl.store(paid_log_decay + slot, owed + tl.zeros(slot.shape, tl.float64), mask=is_row)
    return decay


@triton.jit
def _next_second_moment_of_rows(
    exp_avg_sq,
    max_exp_avg_sq,
    places,
    values,
    order,
    begin,
    end,
    is_row,
    width,
    beta2,
    one_minus_beta2,
    DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Update the one second moment of each row; return what stands under the row's root, ``[rows, 1]``."""
    square = tl.zeros(begin.shape, DTYPE)
    for first in range(0, width, BLOCK_WIDTH):
        grad, _, _ = _sum_block(values, order, begin, end, first, is_row, width, DTYPE, BLOCK_WIDTH)
        square += tl.sum(grad * grad, axis=1)
    square = _quotient(square, tl.full(begin.shape, 1.0, DTYPE) * tl.maximum(width, 1), DTYPE)
    second = tl.load(exp_avg_sq + places, mask=is_row, other=0.0)
    second = beta2 * second + one_minus_beta2 * square
    tl.store(exp_avg_sq + places, second, mask=is_row)
    if AMSGRAD:
        second = _larger(second, tl.load(max_exp_avg_sq + places, mask=is_row, other=0.0))
        tl.store(max_exp_avg_sq + places, second, mask=is_row)
    return second[:, None]


@triton.jit
def _move_weights(
    table,
    places,
    mask,
    moment,
    denom,
    step_size,
    decay,
    row_key,
    columns,
    DTYPE: tl.constexpr,
    STOCHASTIC_ROUNDING: tl.constexpr,
):
    """Update a block of the table."""
    weight = rounding.widen(tl.load(table + places, mask=mask, other=0.0), DTYPE)
    weight = decay * weight - _quotient(step_size * moment, denom + tl.zeros_like(moment), DTYPE)
    if STOCHASTIC_ROUNDING:
        random = rounding.random_bits(row_key, columns, rounding.TABLE)
        stored = rounding.narrow_stochastically(weight, random, table.dtype.element_ty)
    else:
        stored = rounding.narrow(weight, table.dtype.element_ty)
    tl.store(table + places, stored, mask=mask)


@triton.jit(do_not_specialize=_CHANGING)
def update_rows(
    sorted_rows,
    order,
    segments,
    begins,
    values,
    is_new,
    new_counts,
    is_finite,
    counters,
    slot_of_row,
    table,
    rows,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    exp_avg_scale,
    exp_avg_sq_scale,
    row_steps,
    paid_log_decay,
    num_lookups: tl.int64,
    num_rows: tl.int64,
    width,
    table_stride,
    exp_avg_stride,
    exp_avg_sq_stride,
    scale_stride,
    step_key: tl.int64,
    beta1: tl.int64,
    one_minus_beta1: tl.int64,
    beta2: tl.int64,
    one_minus_beta2: tl.int64,
    step_size: tl.int64,
    root_scale: tl.int64,
    eps: tl.int64,
    decay: tl.int64,
    lr: tl.int64,
    log2_beta1: tl.int64,
    log2_beta2: tl.int64,
    log_decay: tl.int64,
    DTYPE: tl.constexpr,
    STORED: tl.constexpr,
    ONE_EXP_AVG_SQ_A_ROW: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    TORCH_EPS: tl.constexpr,
    OWES_DECAY: tl.constexpr,
    STOCHASTIC_ROUNDING: tl.constexpr,
    SKIPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Give new rows their slots and update this program's touched rows.

    ``new_counts`` int64 ``[num_lookups]`` counts the new rows up to each touched one, its own included; ``counters``
    int64 begins with the slots in use before the step. Parts of the state that the options do without are None. Where
    moments are stored as codes, ``BLOCK_WIDTH`` is the length of the blocks that share a scale, or all of a shorter
    row. ``num_rows`` and ``width`` are the table's, strides are in elements.
    """
    num_touched = tl.load(segments + num_lookups - 1)
    if tl.program_id(0).to(tl.int64) * BLOCK_ROWS >= num_touched:
        return  # there are programs for as many rows as there are lookups
    r, is_row, row, begin, end = _touched_rows(sorted_rows, begins, num_touched, num_rows, BLOCK_ROWS)
    if SKIPS:
        is_row = is_row & (tl.load(is_finite + r, mask=is_row, other=0) != 0)
    end = tl.where(is_row, end, begin)

    beta1, one_minus_beta1 = _number(beta1, DTYPE), _number(one_minus_beta1, DTYPE)
    beta2, one_minus_beta2 = _number(beta2, DTYPE), _number(one_minus_beta2, DTYPE)
    eps = _number(eps, DTYPE)

    slot = _find_slots(r, row, is_row, is_new, new_counts, counters, slot_of_row, rows)
    if ROW_STEPS:
        row_step_size, row_root_scale = _own_corrections(
            row_steps, slot, is_row, lr, log2_beta1, log2_beta2, DTYPE, TORCH_EPS
        )
    else:
        row_step_size, row_root_scale = _number(step_size, DTYPE), _number(root_scale, DTYPE)
    if OWES_DECAY:
        row_decay = _pay_decay(paid_log_decay, slot, is_row, log_decay, DTYPE)
    else:
        row_decay = _number(decay, DTYPE)
    if STORED != OWN or STOCHASTIC_ROUNDING:
        row_key = rounding.row_keys(step_key.to(tl.int64).to(tl.uint64, bitcast=True), row)[:, None]
    else:
        row_key = row[:, None]
    if ONE_EXP_AVG_SQ_A_ROW:
        row_under_root = _next_second_moment_of_rows(
            exp_avg_sq,
            max_exp_avg_sq,
            slot * exp_avg_sq_stride,
            values,
            order,
            begin,
            end,
            is_row,
            width,
            beta2,
            one_minus_beta2,
            DTYPE,
            AMSGRAD,
            BLOCK_WIDTH,
        )

    for first in range(0, width, BLOCK_WIDTH):
        grad, columns, mask = _sum_block(values, order, begin, end, first, is_row, width, DTYPE, BLOCK_WIDTH)
        blocks = slot * scale_stride + first // BLOCK_WIDTH
        moment = _next_moment(
            exp_avg,
            exp_avg_scale,
            slot[:, None] * exp_avg_stride + columns,
            blocks,
            is_row,
            mask,
            beta1,
            one_minus_beta1 * grad,
            row_key,
            columns,
            DTYPE,
            STORED,
            rounding.EXP_AVG,
        )
        if ONE_EXP_AVG_SQ_A_ROW:
            under_root = row_under_root
        else:
            elements = slot[:, None] * exp_avg_sq_stride + columns
            under_root = _next_moment(
                exp_avg_sq,
                exp_avg_sq_scale,
                elements,
                blocks,
                is_row,
                mask,
                beta2,
                one_minus_beta2 * (grad * grad),
                row_key,
                columns,
                DTYPE,
                STORED,
                rounding.EXP_AVG_SQ,
            )
            if AMSGRAD:
                under_root = _larger(under_root, tl.load(max_exp_avg_sq + elements, mask=mask, other=0.0))
                tl.store(max_exp_avg_sq + elements, under_root, mask=mask)
        denom = _root(under_root, DTYPE) * row_root_scale + eps
        _move_weights(
            table,
            row[:, None] * table_stride + columns,
            mask,
            moment,
            denom,
            row_step_size,
            row_decay,
            row_key,
            columns,
            DTYPE,
            STOCHASTIC_ROUNDING,
        )
