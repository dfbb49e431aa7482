"""One sparse gradient -> its lookups.

A lookup is one entry of a COO gradient: the indices that name a row of the table, and a value vector. Lookups are read
as the gradient holds them, uncoalesced: repeated rows are for the backend to sum, and ``is_coalesced()`` is never
asked, because it is a claim that can be set by hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _validate
from ._validate import Place


class Lookups(NamedTuple):
    """The entries of a gradient.

    ``indices`` is int64 ``[sparse_dim, num_lookups]`` and ``values`` ``[num_lookups, *row_shape]`` in the table's
    dtype; both are contiguous. Indices are not yet known to lie inside the table.
    """

    indices: Tensor
    values: Tensor


def read_lookups(table: Tensor, grad: Tensor, place: Place) -> Lookups:
    """Read the lookups of ``grad``, having checked all that can be checked without reading indices.

    Args:
        table: the parameter, strided, of any shape.
        grad: its gradient.
        place: the parameter's place, for messages.

    Raises:
        RuntimeError: a dense gradient, a layout other than COO, a shape, dtype or device that is not the table's, or
            values that do not match the indices.
    """
    if grad.layout is not torch.sparse_coo:
        if grad.layout is torch.strided:
            raise _validate.dense_gradient_error(place, grad.shape)
        raise _validate.layout_error(place, grad.layout)
    if grad.shape != table.shape:
        raise _validate.mismatch_error(place, "shape", list(grad.shape), list(table.shape))
    if grad.dtype is not table.dtype:
        raise _validate.mismatch_error(place, "dtype", grad.dtype, table.dtype)
    if grad.device != table.device:
        raise _validate.mismatch_error(place, "device", grad.device, table.device)
    indices, values = grad._indices(), grad._values()
    sparse_dim, num_lookups = indices.shape
    values_shape = (num_lookups, *table.shape[sparse_dim:])
    if values.shape != values_shape:
        raise _validate.values_error(place, values.shape, values_shape)
    return Lookups(indices.contiguous(), values.contiguous())
