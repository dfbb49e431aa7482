"""What backends share that write to a table's memory past PyTorch: where its rows lie, and telling autograd."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from ..moments import Moments

# Whether this torch takes the tables that were written all at once; older ones take one.
_TAKES_LISTS = "Iterable" in str(inspect.signature(torch.autograd.graph.increment_version))


def report_writes(tables: list[Tensor]) -> None:
    """Tell autograd of writes past it: a stale graph is then caught in backward(), as after any in-place operation."""
    if _TAKES_LISTS:
        torch.autograd.graph.increment_version(tables)
        return
    for table in tables:
        torch.autograd.graph.increment_version(table)


def row_stride(table: Tensor, moments: Moments) -> int | None:
    """Return the distance from row to row in elements, or None where rows cannot be walked by one stride."""
    sparse_dim = moments.sparse_dim
    if table.is_contiguous():
        return moments.width
    if not _is_dense(table.shape[sparse_dim:], table.stride()[sparse_dim:], 1):
        return None
    stride = table.stride(sparse_dim - 1) if sparse_dim > 0 else moments.width
    return stride if _is_dense(table.shape[:sparse_dim], table.stride()[:sparse_dim], stride) else None


def memory_refusal(table: Tensor, moments: Moments) -> str | None:
    """Say why rows cannot be walked by one stride, each element being what lies there, or None where they can."""
    if table.data_ptr() == 0 and table.numel() > 0:
        return "the table's storage has been freed"
    if table.is_neg():
        return "the table is a view that negates what lies in memory; .resolve_neg() makes one that does not"
    if row_stride(table, moments) is not None:
        return None
    return (
        "the elements of a row must be adjacent in memory and its rows evenly spaced, and the table has shape "
        f"{list(table.shape)} with strides {list(table.stride())}; .contiguous() makes such a table"
    )


def _is_dense(shape: Sequence[int], strides: Sequence[int], innermost: int) -> bool:
    """Whether dimensions follow each other row-major, the last one in steps of ``innermost``."""
    expected = innermost
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
