"""The rule in plain PyTorch operations, on any device: what the other backends are measured against.

Computes in the dtype of the moments (float32 for half-precision tables) and rounds to the table's dtype once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _validate
from ._types import RowUpdate


def check_rows(updates: Sequence[RowUpdate]) -> None:
    """Refuse an index outside its table.

    Raises:
        IndexError: naming the first table with a bad index, and the index.
    """
    for update in updates:
        sparse_shape = update.table.shape[: update.moments.sparse_dim]
        for dim, (size, indices) in enumerate(zip(sparse_shape, update.indices, strict=True)):
            is_bad = (indices < 0) | (indices >= size)
            if is_bad.any():
                index = int(indices[is_bad][0])
                raise _validate.row_error(update.place, sparse_shape, dim, index)


def coalesce_rows(
    indices: Tensor, values: Tensor, sparse_shape: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum the lookups of each row, in lookup order.

    Returns:
        The touched rows, ascending, ``[num_touched]``, and their gradients ``[num_touched, *row_shape]`` in ``dtype``.
    """
    rows = torch.zeros(indices.shape[1], dtype=torch.int64, device=indices.device)
    for size, index in zip(sparse_shape, indices, strict=True):
        rows = rows * size + index
    # Tensor.coalesce() would do, but it takes a gradient's word for being coalesced and sums in an order of its own.
    rows, order = torch.sort(rows, stable=True)
    touched, counts = torch.unique_consecutive(rows, return_counts=True)
    lookups_by_row = values[order].to(dtype).reshape(len(rows), -1)
    grad = torch.segment_reduce(lookups_by_row, "sum", lengths=counts, axis=0)
    return touched, grad.reshape(len(touched), *values.shape[1:])


@torch.no_grad()
def update_rows(updates: Sequence[RowUpdate]) -> None:
    """Update the touched rows of each table and their moments in place; indices have been checked."""
    for update in updates:
        if update.num_lookups > 0:
            _update_table(update)


def _update_table(update: RowUpdate) -> None:
    table, moments, scalars = update.table, update.moments, update.scalars
    sparse_shape = table.shape[: moments.sparse_dim]
    rows, grad = coalesce_rows(update.indices, update.values, sparse_shape, moments.dtype)
    slots = moments.claim_slots(rows)

    exp_avg = moments.exp_avg[slots].mul_(scalars.beta1).add_(grad * scalars.one_minus_beta1)
    exp_avg_sq = moments.exp_avg_sq[slots].mul_(scalars.beta2)
    exp_avg_sq.add_((grad * grad).mul_(scalars.one_minus_beta2))
    moments.exp_avg[slots] = exp_avg
    moments.exp_avg_sq[slots] = exp_avg_sq

    denom = exp_avg_sq.sqrt_().mul_(scalars.root_scale).add_(scalars.eps)
    change = exp_avg.mul_(scalars.step_size).div_(denom)
    # A table may have any strides, so it is indexed by its own leading dimensions and not viewed as [num_rows, width].
    if moments.sparse_dim == 0:
        table.copy_(table.to(moments.dtype) - change[0])
        return
    index = torch.unravel_index(rows, sparse_shape)
    table[index] = (table[index].to(moments.dtype) - change).to(table.dtype)
